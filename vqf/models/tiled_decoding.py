"""Tiled decoding of large grids in overlapping tiles, to bound the memory.

`decode_tiles` blends tiles. On a line of 10 cells, with tiles of 6 that overlap by 2::

    tile 0    0 1 2 3 4 5                 the weights of both tiles add up to 1 in every pixel
    tile 1            4 5 6 7 8 9         and cross over in the overlap (cells 4 and 5)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_GLOBAL_CELLS = 2**16  # the work of attention grows with the square; of larger grids each tile attends to itself
CONVERGENCE_TOLERANCE = 0.02  # largest change of a mean or deviation between two passes, in standard deviations


class GlobalGroupNorm:
    """Replaces the statistics of group norms by those of a full image that passes in tiles.

    With statistics of their own, tiles would differ in brightness. Pass k collects statistics, and normalizes with
    those of pass k - 1: n norms need at most n passes.

    Example::

        norms = GlobalGroupNorm(decoder)
        for passes in itertools.count(1):
            with norms.collecting():
                decode_tiles(decoder, cells, ..., set_weight=norms.set_weight)
            if norms.converged(passes):
                break
        with norms.frozen():
            images = decode_tiles(decoder, cells, ...)
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [child for child in module.modules() if isinstance(child, nn.GroupNorm)]
        self.statistics: dict[nn.GroupNorm, Tensor] = {}  # last pass: weighted sums of 1, x, x^2, (3, B, groups)
        self.collected: dict[nn.GroupNorm, Tensor] = {}  # the same of the pass that runs
        self.weight = torch.ones(1, 1)
        self.max_change = float("inf")  # of the statistics between the last two passes, in standard deviations

    def converged(self, passes: int) -> bool:
        return self.max_change < CONVERGENCE_TOLERANCE or passes > len(self.statistics)

    def set_weight(self, weight: Tensor) -> None:
        """Set the weight (H, W) of the next tile's pixels."""
        self.weight = weight

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect statistics, which replace the last ones at the end."""
        self.collected = {}
        yield from self._with_hooks(self._collect)
        changes = [
            _max_change(self.statistics[norm], sums, norm.eps)
            for norm, sums in self.collected.items()
            if norm in self.statistics
        ]
        self.max_change = float(torch.stack(changes).max()) if changes else float("inf")
        self.statistics = self.collected

    @contextmanager
    def frozen(self) -> Iterator[None]:
        yield from self._with_hooks(self._normalize)

    def _with_hooks(self, hook: Callable[..., Any]) -> Iterator[None]:
        handles = [norm.register_forward_hook(hook) for norm in self.norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _collect(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0].float().unflatten(1, (norm.num_groups, -1))
        height, width = inputs[0].shape[2:]
        weight = F.adaptive_avg_pool2d(self.weight[None, None].to(x), (height, width))[0, 0]  # at this layer's size
        sums = torch.stack([(power * weight).mean(2).sum((2, 3)) for power in (torch.ones_like(x), x, x.square())])
        self.collected[norm] = self.collected[norm] + sums if norm in self.collected else sums
        return self._normalize(norm, inputs, output) if norm in self.statistics else output

    def _normalize(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        mean, deviation = _moments(self.statistics[norm], norm.eps)
        scale = 1 / deviation
        x = inputs[0].float().unflatten(1, (norm.num_groups, -1))
        shape = (*mean.shape, *(1 for _ in x.shape[2:]))
        x = ((x - mean.view(shape)) * scale.view(shape)).flatten(1, 2)
        if norm.affine:
            x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
        return x.to(output.dtype)


def _moments(sums: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    count, first, second = sums
    mean = first / count
    return mean, (second / count - mean.square() + epsilon).sqrt()


def _max_change(before: Tensor, after: Tensor, epsilon: float) -> Tensor:
    (mean, deviation), (new_mean, new_deviation) = (_moments(sums, epsilon) for sums in (before, after))
    return torch.maximum((new_mean - mean).abs() / deviation, (new_deviation / deviation - 1).abs()).max()


def decode_tiles(
    decode: Callable[[Tensor], Tensor],
    cells: Tensor,
    stride: int,
    tile: int,
    overlap: int,
    set_weight: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Decode cells (..., h, w) in square tiles to images (B, C, h * stride, w * stride).

    Of an overlap, the outer quarter has (almost) no weight, and the two quarters in the middle are blended.

    Args:
        tile: Cells per side of a tile.
        overlap: Cells that neighboring tiles share, in [0, tile).
        set_weight: Called before each tile with the weight (H, W) of its pixels.

    Raises:
        ValueError: If the overlap is out of range.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} cells cannot overlap by {overlap}")
    height, width = cells.shape[-2:]
    down, across = (blend_weights(length, tile, overlap, stride, cells.device) for length in (height, width))
    images: Tensor | None = None
    for top, row_weights in down.items():
        for left, column_weights in across.items():
            weight = row_weights[:, None] * column_weights
            if set_weight is not None:
                set_weight(weight)
            decoded = decode(cells[..., top : top + tile, left : left + tile])
            if images is None:
                images = decoded.new_zeros(*decoded.shape[:2], height * stride, width * stride)
            rows, columns = _pixel_slice(top, decoded.shape[2], stride), _pixel_slice(left, decoded.shape[3], stride)
            images[..., rows, columns] += decoded * weight.to(decoded.dtype)
    assert images is not None
    return images


def blend_weights(length: int, tile: int, overlap: int, stride: int, device: torch.device) -> dict[int, Tensor]:
    """Pixel weights of each tile on a line, by its start; float64, summing to 1."""
    template = torch.ones((), dtype=torch.float64, device=device)
    ramps = {
        start: blend_ramp(start, tile, overlap, length, stride, template)
        for start in tile_starts(length, tile, overlap)
    }
    total = template.new_zeros(length * stride)
    for start, ramp in ramps.items():
        total[_pixel_slice(start, len(ramp), stride)] += ramp
    return {start: ramp / total[_pixel_slice(start, len(ramp), stride)] for start, ramp in ramps.items()}


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of tiles that cover `length` cells; the last may overlap by more."""
    return [*range(0, max(length - tile, 0), tile - overlap), max(length - tile, 0)]


def blend_ramp(start: int, tile: int, overlap: int, length: int, stride: int, template: Tensor) -> Tensor:
    """Weights of a tile's pixels before normalization."""
    tile = min(tile, length)
    weight = template.new_ones(tile * stride)
    if overlap:
        progress = (torch.arange(overlap * stride, device=template.device) + 0.5) / (overlap * stride)
        ramp = (progress * 2 - 0.5).clamp(1e-6, 1).to(template.dtype)  # above 0: the sum of weights is divided by
        if start > 0:
            weight[: overlap * stride] = ramp
        if start + tile < length:
            weight[-overlap * stride :] *= ramp.flip(0)
    return weight


def _pixel_slice(start: int, pixels: int, stride: int) -> slice:
    return slice(start * stride, start * stride + pixels)
