"""VAR's multi-scale quantization: grids of codes from coarse to fine, each of what the coarser ones leave.

Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction, https://arxiv.org/abs/2404.02905,
algorithms 1 and 2.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Len
from einops import rearrange
from torch import Tensor, nn

from vqf.batch import Size, pair
from vqf.options.ranges import Depth, Dimension, Fraction, NonNegativeFloat, Sides
from vqf.protocols import Quantized
from vqf.quantizers.code_revival import CodebookInit, make_revival
from vqf.quantizers.codebook import index_counts, nearest, straight_through, usage_stats
from vqf.registry import register
from vqf.tokens.layout import TokenLayout

Sizes = Annotated[Sequence[Sides], Len(2)]  # of a single scale `vq` is the quantizer


@register("quantizer", "multiscale")
class MultiscaleQuantizer(nn.Module):
    """A codebook shared by grids of several sizes, for a prior that predicts scale by scale, VAR.

    https://arxiv.org/abs/2404.02905, algorithm 1, for latents f, from f̂ = 0: at each scale k
    i_k = nearest code of area(f - f̂, size_k),  f̂ ← f̂ + φ_k(bicubic(e[i_k], size_K)) with
    φ(h) = (1 - ρ) h + ρ conv3x3(h). The loss is mean_k |f̂_k - sg[f]|² + β |sg[f̂_k] - f|².

    Good for VAR, whose prior draws all tokens of a scale at once. For priors that draw token by token `vq` and
    `residual` give shorter sequences. Images have one size, that of the last scale.

    Args:
        sizes: Sides of the grid of each scale, or height and width, from coarse to fine; the last is that of the
            latents.
        dim: Channels of a code vector.
        codebook_size: Number of codes.
        beta: β, the weight of the commitment term.
        weight: Weight of both terms in the total loss.
        phis: Number of different φ; each serves neighboring scales.
        phi_ratio: ρ; 0 leaves the codes as they are.
        revive: A code is moved to a random residual of the batch if the moving average of its occurrences a step is
            below this; 0 never revives, as published.
        init: Initial codes, set after the first step: `latents`, residuals of its batch, or `kmeans` centers of them;
            by default random, as published.
    """

    def __init__(
        self,
        *,
        sizes: Sizes = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        dim: Dimension = 32,
        codebook_size: Dimension = 4096,
        beta: NonNegativeFloat = 0.25,
        weight: NonNegativeFloat = 1.0,
        phis: Depth = 4,
        phi_ratio: Fraction = 0.5,
        revive: NonNegativeFloat = 0.0,
        init: CodebookInit | None = None,
    ) -> None:
        super().__init__()
        self.sizes = _check_sizes([pair(size) for size in sizes])
        self.ends = list(accumulate(height * width for height, width in self.sizes))
        self.dim, self.vocab_size = dim, codebook_size
        self.beta, self.weight, self.phi_ratio = beta, weight, phi_ratio
        self.codebook = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.codebook.weight, -1 / codebook_size, 1 / codebook_size)
        self.phi_of_scale = _spread(len(self.sizes), phis if phi_ratio else 0)
        self.phis = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in set(self.phi_of_scale))
        self.revival = make_revival(codebook_size, revive, init)

    def layout(self, grid: Size, stride: int | None) -> TokenLayout:
        self._check_grid(grid)
        return TokenLayout(self.sizes, (self.vocab_size,), stride)

    def forward(self, f: Tensor) -> Quantized:
        self._check_grid((f.shape[2], f.shape[3]))
        f_hat, chosen, residuals, losses = torch.zeros_like(f), [], [], []
        for k, size in enumerate(self.sizes):
            rest = rearrange(_shrink((f - f_hat).detach(), size), "b d h w -> (b h w) d")
            chosen.append(nearest(rest, self.codebook.weight.detach()))
            residuals.append(rest)
            f_hat = f_hat + self._enlarge(chosen[k].view(len(f), *size), k)
            losses.append((F.mse_loss(f_hat, f.detach()), F.mse_loss(f, f_hat.detach())))
        codebook_loss, commitment_loss = (torch.stack(terms).mean() for terms in zip(*losses, strict=True))
        if self.revival is not None and self.training and torch.is_grad_enabled():
            self.revival.observe(torch.cat(residuals), torch.cat(chosen))
        indices = torch.cat([each.view(len(f), -1) for each in chosen], dim=1)
        stats = {
            **usage_stats(index_counts(indices, self.vocab_size), self.training),
            "commitment": commitment_loss.detach(),
        }
        loss = self.weight * (codebook_loss + self.beta * commitment_loss)
        return Quantized(straight_through(f, f_hat), indices, loss, stats)

    def update(self) -> dict[str, Tensor]:
        return {} if self.revival is None else self.revival.update(self.codebook.weight)

    def lookup(self, indices: Tensor) -> Tensor:
        """f̂ of the first scales, (B, t), in the size of the last.

        Raises:
            ValueError: If t tokens are no whole scales.
        """
        return self._accumulate(indices)[-1]

    def next_scale_inputs(self, indices: Tensor) -> Tensor:
        """What VAR's prior sees at the scales after the first: f̂ of the coarser ones in the scale's size.

        Args:
            indices: (B, t) of the first scales.

        Returns:
            (B, n, dim) for the cells of scale 2 to the one after those given, or to the last. In sampling the cells of
            the last of these scales are the ones to predict.

        Raises:
            ValueError: If t tokens are no whole scales.
        """
        pairs = zip(self._accumulate(indices), self.sizes[1:], strict=False)
        cells = [rearrange(_shrink(f_hat, size), "b d h w -> b (h w) d") for f_hat, size in pairs]
        return torch.cat(cells, dim=1)

    def _accumulate(self, indices: Tensor) -> list[Tensor]:
        """f̂ after each scale."""
        if indices.shape[1] not in self.ends:
            raise ValueError(f"{indices.shape[1]} tokens are no whole scales; these end after {self.ends}")
        spans = [span for span in pairwise([0, *self.ends]) if span[1] <= indices.shape[1]]
        f_hat = self.codebook.weight.new_zeros(len(indices), self.dim, *self.sizes[-1])
        sums = []
        for k, (start, end) in enumerate(spans):
            f_hat = f_hat + self._enlarge(indices[:, start:end].unflatten(1, self.sizes[k]), k)
            sums.append(f_hat)
        return sums

    def _enlarge(self, indices: Tensor, k: int) -> Tensor:
        """φ_k of the codes of scale k, (B, h_k, w_k), in the size of the last scale."""
        h = rearrange(self.codebook(indices), "b h w d -> b d h w")
        if self.sizes[k] != self.sizes[-1]:
            h = F.interpolate(h, self.sizes[-1], mode="bicubic")
        return torch.lerp(h, self.phis[self.phi_of_scale[k]](h), self.phi_ratio) if self.phis else h

    def _check_grid(self, grid: Size) -> None:
        if grid != self.sizes[-1]:
            kept = [size for size in self.sizes[:-1] if size[0] <= grid[0] and size[1] <= grid[1] and size != grid]
            raise ValueError(
                f"the last scale is {_format(self.sizes[-1])}, the latents are {_format(grid)}: the last of `sizes` "
                f"must be theirs, as in model.quantizer.sizes={_format_list([*kept, grid])}"
            )


def _check_sizes(sizes: list[Size]) -> tuple[Size, ...]:
    for before, after in pairwise(sizes):
        if after[0] < before[0] or after[1] < before[1]:
            raise ValueError(
                f"sizes={_format_list(sizes)}: must go from coarse to fine, and {_format(after)} comes after "
                f"{_format(before)}; model.quantizer.sizes={_format_list(_ordered(sizes))} would"
            )
    return tuple(sizes)


def _ordered(sizes: Sequence[Size]) -> list[Size]:
    """The sizes from coarse to fine, without those that are higher but narrower than another."""
    kept: list[Size] = []
    for size in sorted(sizes):
        if not kept or size[1] >= kept[-1][1]:
            kept.append(size)
    return kept


def _spread(scales: int, phis: int) -> list[int]:
    """The number of the φ of each scale: that at the nearest of P ticks from 1/(3P) to 1 - 1/(3P).

    A φ that no scale takes is not counted: DDP waits for the gradient of every parameter. Ties are decided by the
    rounding of float64, as in published weights.
    """
    if not phis:
        return []
    ticks = torch.linspace(1 / (3 * phis), 1 - 1 / (3 * phis), phis, dtype=torch.float64)
    taken = [int((ticks - k / max(scales - 1, 1)).abs().argmin()) for k in range(scales)]
    return [sorted(set(taken)).index(each) for each in taken]


def _shrink(x: Tensor, size: Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="area")


def _format(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"


def _format_list(sizes: Sequence[Size]) -> str:
    return f"[{','.join(map(_format, sizes))}]"
