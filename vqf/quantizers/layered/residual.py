"""Residual quantization: each level quantizes what those before it leave.

Autoregressive Image Generation using Residual Quantization (RQ-VAE), https://arxiv.org/abs/2203.01941, section 3.1;
random depths as in SoundStream, https://arxiv.org/abs/2107.03312, section III-C.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from vqf.batch import Size
from vqf.distributed import comm
from vqf.options.ranges import Depth, Fraction, PositiveFraction
from vqf.protocols import Quantized
from vqf.quantizers.codebook import straight_through
from vqf.quantizers.layered.base_quantizers import (
    base_of,
    build_base,
    codebook_sizes,
    join_indices,
    merge_stats,
    split_indices,
    update_all,
)
from vqf.registry import register
from vqf.tokens.layout import TokenLayout


@register("quantizer", "residual")
class ResidualQuantizer(nn.Module):
    """A code of each cell, a second one of what the first leaves, and so on, https://arxiv.org/abs/2203.01941.

    r_1 = z,  q_d = s^(d-1) Q(r_d / s^(d-1)),  r_(d+1) = r_d - sg[q_d],  output Σ_d q_d.
    The loss is the mean of the levels'. Of `vq` and `ema` its commitment term is β mean_d |z - sg[Σ_(j≤d) q_j]|², the
    paper's. The gradient is the mean of the levels', so the identity where theirs is.

    Good for few cells with many details: D codebooks of V codes distinguish V^D vectors. A prior has D tokens a cell
    to predict; do not take it where one codebook reconstructs well enough. `cosine`, `lfq`, `bsq` and `fsq` give codes
    of one size: with `scale` below 1 the later levels refine, with 1 they overshoot.

    Args:
        base: The quantizer of each level, as {name: ema, dim: 256, codebook_size: 16384}.
        depth: D, the number of levels; 4 in the paper.
        shared: Whether all levels have one codebook, as in the paper, or one each. If one, its dead codes are revived
            by the residuals of the last level.
        dropout: Probability that a training batch has a random depth, uniform in 1..D; the levels beyond it are not
            trained. The first levels alone then reconstruct better. 0 in the paper.
        scale: s, how much smaller each level is than the one before; 1 in the paper, 1/L of `fsq` with L values for
            each channel.
    """

    def __init__(
        self,
        *,
        base: Mapping[str, Any],
        depth: Depth = 4,
        shared: bool = True,
        dropout: Fraction = 0.0,
        scale: PositiveFraction = 1.0,
    ) -> None:
        super().__init__()
        self.depth, self.dropout, self.scale = depth, dropout, scale
        self.levels = build_base(base, 1 if shared else depth)
        first = base_of(self.levels)
        self.dim, self.vocab_size = first.dim, first.vocab_size
        self.level_sizes = codebook_sizes(first)

    def layout(self, grid: Size, stride: int | None) -> TokenLayout:
        return TokenLayout((grid,), self.level_sizes * self.depth, stride)

    def forward(self, z: Tensor) -> Quantized:
        depth = self._training_depth(z)
        rest, parts, codes = z, [], []
        for d in range(self.depth):
            with _gradients(d < depth):  # levels beyond the depth give indices and nothing else
                parts.append(self._level(d)(rest / self.scale**d))
            codes.append(parts[d].latents * self.scale**d)
            rest = rest - codes[d].detach()
        total = sum(codes[1:depth], codes[0])
        loss = torch.stack([part.loss for part in parts[:depth]]).mean() + self._zero_of_levels(depth)
        indices = join_indices([part.indices for part in parts])
        return Quantized(straight_through(total / depth, total), indices, loss, merge_stats(parts))

    def update(self) -> dict[str, Tensor]:
        return update_all(self.levels)

    def lookup(self, indices: Tensor) -> Tensor:
        parts = split_indices(indices, [len(self.level_sizes)] * self.depth)
        first, *more = [self._level(d).lookup(part) * self.scale**d for d, part in enumerate(parts)]
        return sum(more, first)

    def _level(self, d: int) -> Any:
        return self.levels[d % len(self.levels)]

    def _training_depth(self, z: Tensor) -> int:
        """The number of levels that a forward pass uses, the same on all ranks."""
        if not (self.dropout and self.training and torch.is_grad_enabled()):
            return self.depth
        drops, share = comm.broadcast(torch.rand(2, device=z.device)).tolist()
        return 1 + int(share * self.depth) if drops < self.dropout else self.depth

    def _zero_of_levels(self, depth: int) -> Tensor | float:
        """0 with a gradient of 0 for the levels beyond a depth: DDP waits for the gradient of every parameter."""
        weights = [weight for level in self.levels[depth:] for weight in level.parameters() if weight.requires_grad]
        return sum((0 * weight.sum() for weight in weights), 0.0)


def _gradients(enabled: bool) -> AbstractContextManager[Any]:
    return torch.set_grad_enabled(enabled and torch.is_grad_enabled())
