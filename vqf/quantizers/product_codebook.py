"""The codebook of all combinations of a few values for each channel, of which only those values are held."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Len
from torch import Tensor, nn

from vqf.batch import Size
from vqf.distributed import comm
from vqf.options.ranges import Dimension
from vqf.quantizers.codebook import index_counts, usage_stats
from vqf.tokens.layout import MAX_COUNTED, TokenLayout

MAX_CODES = 2**62  # of one codebook: indices are int64

DigitOrder = Literal["little", "big"]
Factors = Annotated[Sequence[Dimension], Len(1)]


class ProductCodebook(nn.Module):
    """Numbers the codes: the position of each channel's value among its values is a digit of the index.

    The digits of a codebook's channels make its index, Σ_i digit_i Π_{j<i} levels_j.

    Args:
        values: The values of each channel, at least 2.
        factors: Channels of each codebook, one after the other; None for one codebook of all channels.
        order: Whether a codebook's first channel is the lowest digit (`little`), or the highest.

    Raises:
        ValueError: If the factors do not add up to the channels, or a codebook has 2^62 codes or more.
    """

    values: Tensor  # (D, most values of a channel), padded with NaN; the dtype of what is looked up
    place: Tensor  # (D,) int64, what a channel's digit is multiplied by
    modulus: Tensor  # (D,) int64; of a codebook's highest digit it is so large that an index out of range is an error
    owner: Tensor  # (D,) int64, the codebook of a channel

    def __init__(
        self, values: Sequence[Sequence[float]], factors: Factors | None = None, order: DigitOrder = "little"
    ) -> None:
        super().__init__()
        levels = [len(each) for each in values]
        self.factors = _check_factors(factors, len(levels))
        groups = [list(group) for group in _split(levels, self.factors)]
        self.vocab_sizes = tuple(map(math.prod, groups))
        _check_sizes(self.vocab_sizes)
        place, modulus = zip(*(pair for group in groups for pair in _places(group, order)), strict=True)
        owner = [k for k, size in enumerate(self.factors) for _ in range(size)]
        padded = [[*each, *[math.nan] * (max(levels) - len(each))] for each in values]
        self.register_buffer("values", torch.tensor(padded, dtype=torch.get_default_dtype()), persistent=False)
        for name, numbers in (("place", place), ("modulus", modulus), ("owner", owner)):
            self.register_buffer(name, torch.tensor(numbers), persistent=False)

    @property
    def vocab_size(self) -> int:
        """Size of the largest codebook."""
        return max(self.vocab_sizes)

    def layout(self, grid: Size, stride: int | None) -> TokenLayout:
        """The layout of the tokens of latents (B, D, *grid)."""
        return TokenLayout((grid,), self.vocab_sizes, stride)

    def encode(self, digits: Tensor) -> Tensor:
        """Turn digits (B, D, h, w) int64 into indices: (B, h, w), with K codebooks (B, h, w, K)."""
        parts = (digits * self.place[:, None, None]).split(self.factors, dim=1)
        indices = torch.stack([part.sum(1) for part in parts], dim=-1)
        return indices if len(self.factors) > 1 else indices[..., 0]

    def decode(self, indices: Tensor) -> Tensor:
        """Turn indices, of all codebooks or the first ones, into the digits of their channels."""
        if len(self.factors) == 1:
            indices = indices[..., None]
        channels = sum(self.factors[: indices.shape[-1]])
        digits = indices[..., self.owner[:channels]] // self.place[:channels] % self.modulus[:channels]
        return digits.movedim(-1, 1)

    def latents(self, digits: Tensor) -> Tensor:
        """The values (B, D, h, w) of digits; channels that are left out are 0."""
        batch, channels, *grid = digits.shape
        rows = self.values[:channels].gather(1, digits.transpose(0, 1).flatten(1))
        latents = rows.unflatten(1, (batch, *grid)).transpose(0, 1)
        return F.pad(latents, (0, 0, 0, 0, 0, len(self.values) - channels))

    def lookup(self, indices: Tensor) -> Tensor:
        """The latents of indices, of all codebooks or the first ones."""
        return self.latents(self.decode(indices))

    def usage_stats(self, indices: Tensor, training: bool) -> dict[str, Tensor]:
        """Geometric mean of the codebooks' `perplexity` and mean `batch_usage`; nothing if one is too large to count.

        Args:
            training: Whether to sum over ranks, which must all call this then.
        """
        if self.vocab_size > MAX_COUNTED:
            return {}
        by_codebook = indices.reshape(-1, len(self.factors)).unbind(1)
        counts = torch.cat([index_counts(*each) for each in zip(by_codebook, self.vocab_sizes, strict=True)])
        counts = comm.all_reduce_sum(counts) if training else counts
        each = [usage_stats(part) for part in counts.split(self.vocab_sizes)]
        perplexity = torch.stack([stats["perplexity"] for stats in each])
        usage = torch.stack([stats["batch_usage"] for stats in each])
        return {"perplexity": perplexity.log().mean().exp(), "batch_usage": usage.mean()}


def _check_factors(factors: Sequence[int] | None, channels: int) -> tuple[int, ...]:
    if factors is None:
        return (channels,)
    if min(factors, default=0) < 1 or sum(factors) != channels:
        raise ValueError(
            f"factors={list(factors)}: the channels of each codebook, at least 1, must add up to the {channels} "
            f"channels; factors=[{channels // 2},{channels - channels // 2}] would"
        )
    return tuple(factors)


def _check_sizes(vocab_sizes: Sequence[int]) -> None:
    if max(vocab_sizes) >= MAX_CODES:
        raise ValueError(
            f"a codebook of 2^{math.log2(max(vocab_sizes)):.0f} codes: an index holds less than 2^62; give several "
            "codebooks with factors=[...], the channels of each"
        )


def _split(levels: Sequence[int], factors: Sequence[int]) -> list[Sequence[int]]:
    ends = [sum(factors[: k + 1]) for k in range(len(factors))]
    return [levels[end - size : end] for end, size in zip(ends, factors, strict=True)]


def _places(levels: Sequence[int], order: DigitOrder) -> list[tuple[int, int]]:
    """Place and modulus of each channel of a codebook."""
    ordered = levels if order == "little" else levels[::-1]
    places = [math.prod(ordered[:i]) for i in range(len(ordered))]
    pairs = list(zip(places, [*ordered[:-1], MAX_CODES], strict=True))
    return pairs if order == "little" else pairs[::-1]
