"""From logits to a sampled token.

Filters compose in the order temperature, top-k, top-p (The Curious Case of Neural Text Degeneration,
https://arxiv.org/abs/1904.09751), min-p (Turning Up the Heat: Min-p Sampling, https://arxiv.org/abs/2407.01082).
"""

import math

import numpy as np
import torch
from torch import Tensor

UNIFORM_BITS = 24  # precision of a float32 in [0, 1)
# Probabilities as integers. They sum to 2^38, give or take a rounding each, and are multiplied by a number of 24 bits:
# the product stays below 2^63.
WEIGHT_BITS = 38


def temperature(logits: Tensor, value: float) -> Tensor:
    """Divide logits (..., V) by a temperature above 0, without overflow."""
    return (logits - logits.amax(-1, keepdim=True)) / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Set logits (..., V) below the k-th best to -inf; ties stay, k may exceed V."""
    threshold = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Set logits (..., V) to -inf but the fewest best ones whose probability reaches p; of equals the first wins."""
    if p >= 1:
        return logits  # rounding of the cumulative sum could drop the tail
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1, dtype=torch.float32)
    better = probabilities.cumsum(-1) - probabilities
    outside = better >= p
    outside[..., 0] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Set logits (..., V) less than p times as likely as the best to -inf."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)


def sample_from_logits(logits: Tensor, noise: Tensor) -> Tensor:
    """Sample indices (...) int64 from logits (..., V), by inverting the cumulative distribution.

    Args:
        noise: (...) in [0, 1), of which 24 bits are used.
    """
    # In integers: a parallel cumulative sum of floats can grow at a probability of 0, which would then be sampled.
    weights = (logits.softmax(-1, dtype=torch.float32) * 2**WEIGHT_BITS).round().long()
    cumulative = weights.cumsum(-1)
    threshold = (noise * 2**UNIFORM_BITS).long() * cumulative[..., -1] >> UNIFORM_BITS
    return torch.searchsorted(cumulative, threshold[..., None], right=True)[..., 0]


def sample_noise(seed: int, index: int, count: int) -> Tensor:
    """Uniform numbers (count,) in [0, 1) on the CPU, by seed and index alone."""
    # Not a torch.Generator: that of the CPU uses 32 bits of its seed, so that many samples would soon collide.
    key = np.array([seed % 2**64, index % 2**64], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(count) >> np.uint64(64 - UNIFORM_BITS)
    return torch.from_numpy(raw.astype(np.float32) / np.float32(2**UNIFORM_BITS))


def batch_noise(seed: int, first: int, batch: int, count: int) -> Tensor:
    """The `sample_noise` (batch, count) of samples `first`, `first + 1`, ..."""
    return torch.stack([sample_noise(seed, first + i, count) for i in range(batch)])
