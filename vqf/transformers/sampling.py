"""Sampling: what is done to logits before a draw, the draw, and the sampler that goes token by token.

The filters compose in the order temperature, top-k, top-p, each acting on what the one before left. Top-p is
The Curious Case of Neural Text Degeneration, https://arxiv.org/abs/1904.09751.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqf.errors import UserError
from vqf.protocols import Autoregressive, Size
from vqf.registry import register

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


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw an index from each row of logits (B, V) by inverting its cumulative distribution.

    Args:
        logits: Unnormalised; -inf is never drawn.
        uniforms: (B,) in [0, 1), of which the first 24 bits count.

    Returns:
        (B,) int64.
    """
    # In integers: a float cumulative sum, done in parallel, can grow where a probability is 0.
    weights = (logits.softmax(-1, dtype=torch.float32) * 2**WEIGHT_BITS).round().long()
    cumulative = weights.cumsum(-1)
    threshold = (uniforms * 2**UNIFORM_BITS).long() * cumulative[:, -1] >> UNIFORM_BITS
    return torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]


def uniforms(seed: int, index: int, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) that depend on the seed and the index of a sample alone, on the CPU."""
    # Not a torch.Generator: the CPU's looks at 32 bits of its seed, and many samples would soon share one.
    key = np.array([seed % 2**64, index % 2**64], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(count) >> np.uint64(64 - UNIFORM_BITS)
    return torch.from_numpy(raw.astype(np.float32) / np.float32(2**UNIFORM_BITS))


@register("sampler", "autoregressive")
class AutoregressiveSampler:
    """Draws tokens one after the other, row by row.

    Args:
        temperature: Below 1 sharpens the prior's distribution, above 1 flattens it.
        top_k: Draw among this many best codes; all by default.
        top_p: Draw among the best codes that together reach this probability; all by default.
        cache: Remember keys and values between tokens. Off, or with a prior that is not `Autoregressive`,
            every token costs a whole forward pass.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        cache: bool = True,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}; top_k=1 takes the best code")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}; null draws among all codes")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {top_p}; null draws among all codes")
        self.temperature, self.top_k, self.top_p, self.cache = temperature, top_k, top_p, cache

    @torch.no_grad()
    def __call__(
        self, prior: Any, prefix: Tensor, grid: Size, *, seed: int, first: int = 0, known: Tensor | None = None
    ) -> Tensor:
        """Draw tokens (B, h * w) from a prior in eval mode.

        Args:
            prior: Gives logits; see `vqf.protocols.Prior`.
            prefix: (B, M), the condition of each sample.
            grid: Height and width in tokens.
            seed: With `first + i` it decides sample i, whatever else is in the batch.
            first: Index of the batch's first sample.
            known: (B, h * w) int64, tokens to keep, -1 where one is to be drawn.
        """
        batch, count = len(prefix), grid[0] * grid[1]
        tokens = torch.full((batch, count), -1, device=prefix.device) if known is None else known.clone()
        _check_known(tokens, (batch, count), prior.vocab_size)
        numbers = torch.stack([uniforms(seed, first + i, count) for i in range(batch)]).to(prefix.device)
        following = self._logits(prior, prefix, tokens)
        for n in range(count):
            logits = following(n)
            if n == 0:
                _check_numbers(logits)
            drawn = draw(self.filter(logits), numbers[:, n])
            tokens[:, n] = torch.where(tokens[:, n] < 0, drawn, tokens[:, n])
        return tokens

    def filter(self, logits: Tensor) -> Tensor:
        """Apply temperature, top-k and top-p to logits (..., V)."""
        logits = temperature(logits.float(), self.temperature)
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        return logits if self.top_p is None else top_p(logits, self.top_p)

    def _logits(self, prior: Any, prefix: Tensor, tokens: Tensor) -> Callable[[int], Tensor]:
        """Return what gives the logits (B, V) of token n = 0, 1, ..., given `tokens` up to there."""
        if not (self.cache and isinstance(prior, Autoregressive)):
            return lambda n: prior(tokens.clamp(min=0), prefix)[:, n]
        first, cache = prior.begin(prefix)
        return lambda n: prior.advance(tokens[:, n - 1], cache) if n else first


def _check_known(tokens: Tensor, shape: tuple[int, int], vocab_size: int) -> None:
    if tokens.shape != shape:
        raise ValueError(f"known tokens must be {shape}, not {tuple(tokens.shape)}")
    if tokens.max() >= vocab_size:
        raise ValueError(f"known tokens must be below {vocab_size}, the prior's vocabulary, not {int(tokens.max())}")


def _check_numbers(logits: Tensor) -> None:
    if logits.isnan().any():
        raise UserError("the prior's logits are not numbers: its training diverged; go back to an earlier checkpoint")
