"""Sampling: what is done to logits before a draw, the draw, and the sampler that goes token by token.

The filters compose in the order temperature, top-k, top-p, min-p, each acting on what the one before left. Top-p is
The Curious Case of Neural Text Degeneration, https://arxiv.org/abs/1904.09751; min-p is
Turning Up the Heat: Min-p Sampling, https://arxiv.org/abs/2407.01082.
"""

import math

import numpy as np
import torch
from torch import Tensor

UNIFORM_BITS = 24  # all that a float32 in [0, 1) holds
WEIGHT_BITS = 38  # with the uniform's bits, products stay below 2 ** 63


def temperature(logits: Tensor, value: float) -> Tensor:
    """Divide logits (..., V) by a temperature; the best is 0 afterwards, so that no small value overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Set all logits (..., V) below the k-th best to -inf. Ties with it stay; k may exceed V."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Set to -inf all logits (..., V) outside the smallest set of the best whose probability reaches p.

    The best stays whatever p is; of equal logits the lower index counts as better.
    """
    if p >= 1:
        return logits  # rounding of the sum would cut the tail
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1, dtype=torch.float32)
    better = probabilities.cumsum(-1) - probabilities
    outside = better >= p
    outside[..., 0] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Set to -inf all logits (..., V) of codes less than p times as likely as the best, which stays whatever p is."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)


def sample_from_logits(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw an index from each row of logits (B, V) by inverting its cumulative distribution.

    Args:
        logits: Unnormalised; -inf is never drawn.
        noise: (B,) in [0, 1), of which the first 24 bits count.

    Returns:
        (B,) int64.
    """
    # In integers: a float cumulative sum, done in parallel, can grow where a probability is 0.
    weights = (logits.softmax(-1, dtype=torch.float32) * 2**WEIGHT_BITS).round().long()
    cumulative = weights.cumsum(-1)
    threshold = (noise * 2**UNIFORM_BITS).long() * cumulative[:, -1] >> UNIFORM_BITS
    return torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]


def sample_noise(seed: int, index: int, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) that depend on the seed and the index of a sample alone, on the CPU."""
    # Not a torch.Generator: the CPU's looks at 32 bits of its seed, and many samples would soon share one.
    key = np.array([seed % 2**64, index % 2**64], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(count) >> np.uint64(64 - UNIFORM_BITS)
    return torch.from_numpy(raw.astype(np.float32) / np.float32(2**UNIFORM_BITS))


def batch_noise(seed: int, first: int, batch: int, count: int) -> Tensor:
    """Return the numbers (batch, count) of samples `first`, `first + 1`, ..., on the CPU."""
    return torch.stack([sample_noise(seed, first + i, count) for i in range(batch)])
