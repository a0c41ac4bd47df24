"""Decoding a large grid of codes piece by piece, where the whole asks for too much memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class SharedNorms:
    """Group norms of a module that normalise every tile by the statistics of all tiles together.

    Each tile by its own would come out in another brightness and contrast than its neighbour. Within `measuring()` each
    norm works as ever and takes notes; within `applied()` it uses what was noted, averaged over the tiles.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [each for each in module.modules() if isinstance(each, nn.GroupNorm)]
        self.sums: dict[nn.Module, list[Tensor]] = {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Take notes."""
        yield from self._hooked(self._note)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Normalise by what was noted."""
        yield from self._hooked(self._apply)

    def _hooked(self, hook: Callable[..., Any]) -> Iterator[None]:
        handles = [norm.register_forward_hook(hook) for norm in self.norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].float().unflatten(1, (norm.num_groups, -1)).flatten(2)
        seen = self.sums.setdefault(norm, [torch.zeros(()), torch.zeros(()), torch.zeros(())])
        for i, value in enumerate((x.mean(2), x.square().mean(2), torch.ones(()))):
            seen[i] = seen[i].to(value.device) + value

    def _apply(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        first, second, count = self.sums[norm]
        mean = first / count.to(first.device)
        scale = (second / count.to(first.device) - mean.square() + norm.eps).rsqrt()
        x = inputs[0].float().unflatten(1, (norm.num_groups, -1))
        shape = (*mean.shape, *(1 for _ in x.shape[2:]))
        x = ((x - mean.view(shape)) * scale.view(shape)).flatten(1, 2)
        if norm.affine:
            x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
        return x.to(output.dtype)


def decode_tiles(decode: Callable[[Tensor], Tensor], indices: Tensor, stride: int, tile: int, overlap: int) -> Tensor:
    """Decode indices (B, h, w) in square tiles, each fading into the next where they overlap.

    A decoder sees nothing beyond the border of a tile, so what it draws there counts for nothing: of the overlap, the
    outer quarter is left out and the two in the middle are blended.

    Args:
        decode: From indices (B, h, w) to pictures (B, C, h * stride, w * stride).
        indices: Of the whole picture.
        stride: Pixels per code and side.
        tile: Codes per side of a tile.
        overlap: Codes that neighbouring tiles share; more hides more of the border, and costs more.

    Raises:
        ValueError: If tiles would not get ahead.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} codes cannot overlap by {overlap}")
    rows, columns = (starts(length, tile, overlap) for length in indices.shape[1:])
    total, weights = torch.zeros(()), torch.zeros(())
    for top in rows:
        for left in columns:
            piece = decode(indices[:, top : top + tile, left : left + tile])
            if total.ndim == 0:
                total = piece.new_zeros(*piece.shape[:2], *(side * stride for side in indices.shape[1:]))
                weights = total.new_zeros(total.shape[2:])
            place = (..., _span(top, piece.shape[2], stride), _span(left, piece.shape[3], stride))
            down = fade(top, tile, overlap, indices.shape[1], stride, piece)
            across = fade(left, tile, overlap, indices.shape[2], stride, piece)
            total[place] += piece * (down[:, None] * across)
            weights[place] += down[:, None] * across
    return total / weights


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles start so that they cover a length; the last ends with it."""
    return [*range(0, max(length - tile, 0), tile - overlap), max(length - tile, 0)]


def fade(start: int, tile: int, overlap: int, length: int, stride: int, like: Tensor) -> Tensor:
    """Return the weight of every row, or column, of pixels of a tile: it fades where another tile goes on."""
    tile = min(tile, length)
    weight = like.new_ones(tile * stride)
    if overlap:
        places = (torch.arange(overlap * stride, device=like.device) + 0.5) / (overlap * stride)
        ramp = (places * 2 - 0.5).clamp(1e-6, 1).to(like.dtype)  # never 0: the last tile may overlap by more
        if start > 0:
            weight[: overlap * stride] = ramp
        if start + tile < length:
            weight[-overlap * stride :] *= ramp.flip(0)
    return weight


def _span(start: int, pixels: int, stride: int) -> slice:
    return slice(start * stride, start * stride + pixels)
