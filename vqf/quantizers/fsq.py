"""Finite scalar quantization: each channel is rounded to one of a few values.

Finite Scalar Quantization: VQ-VAE Made Simple, https://arxiv.org/abs/2309.15505, appendix A.1; `symmetric` is that of
Scaling Transformers for Low-Bitrate High-Quality Speech Coding, https://arxiv.org/abs/2411.19842, section 3.2; `ifsq`
that of iFSQ: Improving FSQ for Image Generation with 1 Line of Code, https://arxiv.org/abs/2601.17124.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Interval, Len
from torch import Tensor, nn

from vqf.batch import Size
from vqf.protocols import Quantized
from vqf.quantizers.codebook import straight_through
from vqf.quantizers.product_codebook import Factors, ProductCodebook
from vqf.registry import register
from vqf.tokens.layout import TokenLayout

EPSILON = 1e-3  # the paper's; it keeps an even number of levels from having one more at the end

Bound = Literal["paper", "centered", "symmetric", "ifsq"]
Levels = Annotated[Sequence[Annotated[int, Interval(ge=2, le=2**16)]], Len(1)]


@register("quantizer", "fsq")
class FiniteScalarQuantizer(nn.Module):
    """Rounds each channel to one of L values: no codebook, no loss, no collapse, https://arxiv.org/abs/2309.15505.

    digit = round(f(z)) + ⌊L/2⌋ with f(z) = tanh(z + s) (L - 1) (1 - ε) / 2 - o, o = 1/2 for even L and else 0;
    the decoder gets round(f(z)) / ⌊L/2⌋, with the gradient of f(z) / ⌊L/2⌋.

    Good from some 2^10 codes on. Below, and where the decoder is small, learned codes (`vq`, `cosine`) reconstruct
    better.

    Args:
        levels: L, the number of values of each channel; their product is the number of codes. The paper has
            [8,6,5], [8,5,5,5], [7,5,5,5,5], [8,8,8,6,5] and [8,8,8,5,5,5] for about 2^8 to 2^16.
        bound: `paper`: s = tan(o / half) with half = (L - 1) (1 - ε) / 2. `centered`, the widespread PyTorch version:
            1 + ε in place of 1 - ε and atanh in place of tan, so that f(0) = 0; for L above 2. `symmetric`: values from
            -1 to 1, evenly spaced also for even L. `ifsq`: the same with 2 / (1 + exp(-1.6 z)) - 1 in place of tanh,
            which spreads normally distributed latents about evenly.
        factors: Channels of each codebook, as [2,2] for two; by default one codebook of all channels.
    """

    def __init__(
        self, *, levels: Levels = (8, 5, 5, 5), bound: Bound = "paper", factors: Factors | None = None
    ) -> None:
        super().__init__()
        if bound == "centered" and min(levels) < 3:
            raise ValueError(f"levels={list(levels)}: each channel needs at least 3 values with bound=centered")
        self.levels, self.bound = tuple(levels), bound
        self.codebook = ProductCodebook([_values(count, bound) for count in levels], factors)
        self.dim, self.vocab_size = len(self.levels), self.codebook.vocab_size

    def layout(self, grid: Size, stride: int | None) -> TokenLayout:
        return self.codebook.layout(grid, stride)

    def forward(self, z: Tensor) -> Quantized:
        y = self._bounded(z.to(torch.promote_types(z.dtype, torch.float32)))
        top = y.new_tensor(self.levels)[:, None, None].long() - 1
        digits = (y.detach() + 0.5).floor().long().clamp(top.new_zeros(()), top)
        indices = self.codebook.encode(digits)
        soft = y * y.new_tensor([2 / _span(count, self.bound) for count in self.levels])[:, None, None]
        latents = straight_through(soft.to(z.dtype), self.codebook.latents(digits).to(z.dtype))
        return Quantized(latents, indices, z.new_zeros(()), self.codebook.usage_stats(indices, self.training))

    def lookup(self, indices: Tensor) -> Tensor:
        return self.codebook.lookup(indices)

    def _bounded(self, z: Tensor) -> Tensor:
        """f(z) + ⌊L/2⌋, whose nearest integer is the digit."""
        half, offset, shift = z.new_tensor([_constants(count, self.bound) for count in self.levels]).T[..., None, None]
        if self.bound == "ifsq":
            return torch.sigmoid(1.6 * z) * 2 * half
        return torch.tanh(z + shift) * half + offset


def _constants(levels: int, bound: Bound) -> tuple[float, float, float]:
    """Half the width of tanh, what is added after it, and before it."""
    if bound in ("symmetric", "ifsq"):
        return (levels - 1) / 2, (levels - 1) / 2, 0.0
    half = (levels - 1) * (1 + EPSILON if bound == "centered" else 1 - EPSILON) / 2
    o = 0.0 if levels % 2 else 0.5
    return half, levels // 2 - o, math.atanh(o / half) if bound == "centered" else math.tan(o / half)


def _span(levels: int, bound: Bound) -> int:
    """Steps from the value -1 to the value 1."""
    return levels - 1 if bound in ("symmetric", "ifsq") else levels // 2 * 2


def _values(levels: int, bound: Bound) -> list[float]:
    span = _span(levels, bound)
    return [2 * digit / span - 1 for digit in range(levels)]
