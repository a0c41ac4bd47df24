"""Decoding a large grid of codes piece by piece, where the whole asks for too much memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVERGENCE_TOLERANCE = (
    0.02  # of a standard deviation: statistics that move by less from look to look are those of the whole
)


class GlobalGroupNorm:
    """Group norms of a module that normalise every tile by the statistics of the whole image.

    Each tile by its own would come out in another brightness and contrast than its neighbour. Within `measuring()` each
    norm takes notes of what is kept of every tile, and works by the notes of the look before, or as ever in the first;
    within `applied()` it works by what was noted last. A norm sees what those before it made of a tile, so each look
    gets one more of them right: after as many looks as there are norms all of them are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [each for each in module.modules() if isinstance(each, nn.GroupNorm)]
        self.statistics: dict[nn.GroupNorm, Tensor] = {}  # (3, B, groups): weighted sums of 1, x and x^2
        self.collected: dict[nn.GroupNorm, Tensor] = {}
        self.weight = torch.ones(1, 1)
        self.max_change = float("inf")  # of the statistics between the last two looks, in standard deviations

    def converged(self, passes: int) -> bool:
        """Tell whether another look, after so many, would see nothing new."""
        return self.max_change < CONVERGENCE_TOLERANCE or passes > len(self.statistics)

    def set_weight(self, weight: Tensor) -> None:
        """Say how much of every pixel (H, W) of the next tile is kept."""
        self.weight = weight

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Take notes."""
        self.collected = {}
        yield from self._with_hooks(self._collect)
        moved = [
            _max_change(self.statistics[norm], sums, norm.eps)
            for norm, sums in self.collected.items()
            if norm in self.statistics
        ]
        self.max_change = float(torch.stack(moved).max()) if moved else float("inf")
        self.statistics = self.collected

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Normalise by what was noted."""
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
        weight = F.adaptive_avg_pool2d(self.weight[None, None].to(x), (height, width))[0, 0]
        sums = torch.stack([(each * weight).mean(2).sum((2, 3)) for each in (torch.ones_like(x), x, x.square())])
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
    (mean, deviation), (other, wider) = (_moments(each, epsilon) for each in (before, after))
    return torch.maximum((other - mean).abs() / deviation, (wider / deviation - 1).abs()).max()


def decode_tiles(
    decode: Callable[[Tensor], Tensor],
    cells: Tensor,
    stride: int,
    tile: int,
    overlap: int,
    set_weight: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Decode codes (..., h, w) in square tiles, each fading into the next where they overlap.

    A decoder sees nothing beyond the border of a tile, so what it draws there counts for nothing: of the overlap, the
    outer quarter is left out and the two in the middle are blended.

    Args:
        decode: From a part of them to images (B, C, height * stride, width * stride).
        cells: Of the whole image: indices, latents, or whatever has a cell for each.
        stride: Pixels per code and side.
        tile: Codes per side of a tile.
        overlap: Codes that neighbouring tiles share; more hides more of the border, and costs more.
        set_weight: Told before every tile how much of its pixels (H, W) counts; over all tiles it adds up to 1
            everywhere.

    Raises:
        ValueError: If tiles would not get ahead.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} codes cannot overlap by {overlap}")
    height, width = cells.shape[-2:]
    down, across = (blend_weights(length, tile, overlap, stride, cells.device) for length in (height, width))
    total: Tensor | None = None
    for top, rows in down.items():
        for left, columns in across.items():
            share = rows[:, None] * columns
            if set_weight is not None:
                set_weight(share)
            piece = decode(cells[..., top : top + tile, left : left + tile])
            if total is None:
                total = piece.new_zeros(*piece.shape[:2], height * stride, width * stride)
            place = (..., _pixel_slice(top, piece.shape[2], stride), _pixel_slice(left, piece.shape[3], stride))
            total[place] += piece * share.to(piece.dtype)
    assert total is not None
    return total


def blend_weights(length: int, tile: int, overlap: int, stride: int, device: torch.device) -> dict[int, Tensor]:
    """Return by the start of every tile how much of each row, or column, of its pixels counts, in float64."""
    like = torch.ones((), dtype=torch.float64, device=device)
    weights = {
        start: blend_ramp(start, tile, overlap, length, stride, like) for start in tile_starts(length, tile, overlap)
    }
    total = like.new_zeros(length * stride)
    for start, weight in weights.items():
        total[_pixel_slice(start, len(weight), stride)] += weight
    return {start: weight / total[_pixel_slice(start, len(weight), stride)] for start, weight in weights.items()}


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles start so that they cover a length; the last ends with it."""
    return [*range(0, max(length - tile, 0), tile - overlap), max(length - tile, 0)]


def blend_ramp(start: int, tile: int, overlap: int, length: int, stride: int, template: Tensor) -> Tensor:
    """Return the weight of every row, or column, of pixels of a tile: it fades where another tile goes on."""
    tile = min(tile, length)
    weight = template.new_ones(tile * stride)
    if overlap:
        places = (torch.arange(overlap * stride, device=template.device) + 0.5) / (overlap * stride)
        ramp = (places * 2 - 0.5).clamp(1e-6, 1).to(template.dtype)  # never 0: the last tile may overlap by more
        if start > 0:
            weight[: overlap * stride] = ramp
        if start + tile < length:
            weight[-overlap * stride :] *= ramp.flip(0)
    return weight


def _pixel_slice(start: int, pixels: int, stride: int) -> slice:
    return slice(start * stride, start * stride + pixels)
