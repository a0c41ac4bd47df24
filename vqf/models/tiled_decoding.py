"""Decoding a large grid of codes piece by piece, where the whole asks for too much memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SETTLED = 0.02  # of a standard deviation: statistics that move by less from look to look are those of the whole


class SharedNorms:
    """Group norms of a module that normalise every tile by the statistics of the whole picture.

    Each tile by its own would come out in another brightness and contrast than its neighbour. Within `measuring()` each
    norm takes notes of what is kept of every tile, and works by the notes of the look before, or as ever in the first;
    within `applied()` it works by what was noted last. A norm sees what those before it made of a tile, so each look
    gets one more of them right: after as many looks as there are norms all of them are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [each for each in module.modules() if isinstance(each, nn.GroupNorm)]
        self.known: dict[nn.GroupNorm, Tensor] = {}  # (3, B, groups): weighted sums of 1, x and x^2
        self.noted: dict[nn.GroupNorm, Tensor] = {}
        self.share = torch.ones(1, 1)
        self.change = float("inf")  # of the statistics between the last two looks, in standard deviations

    def settled(self, looks: int) -> bool:
        """Tell whether another look, after so many, would see nothing new."""
        return self.change < SETTLED or looks > len(self.known)

    def keep(self, share: Tensor) -> None:
        """Say how much of every pixel (H, W) of the next tile is kept."""
        self.share = share

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Take notes."""
        self.noted = {}
        yield from self._hooked(self._measure)
        moved = [_change(self.known[norm], sums, norm.eps) for norm, sums in self.noted.items() if norm in self.known]
        self.change = float(torch.stack(moved).max()) if moved else float("inf")
        self.known = self.noted

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

    def _measure(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0].float().unflatten(1, (norm.num_groups, -1))
        height, width = inputs[0].shape[2:]
        weight = F.adaptive_avg_pool2d(self.share[None, None].to(x), (height, width))[0, 0]
        sums = torch.stack([(each * weight).mean(2).sum((2, 3)) for each in (torch.ones_like(x), x, x.square())])
        self.noted[norm] = self.noted[norm] + sums if norm in self.noted else sums
        return self._apply(norm, inputs, output) if norm in self.known else output

    def _apply(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        mean, deviation = _moments(self.known[norm], norm.eps)
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


def _change(before: Tensor, after: Tensor, epsilon: float) -> Tensor:
    (mean, deviation), (other, wider) = (_moments(each, epsilon) for each in (before, after))
    return torch.maximum((other - mean).abs() / deviation, (wider / deviation - 1).abs()).max()


def decode_tiles(
    decode: Callable[[Tensor], Tensor],
    codes: Tensor,
    stride: int,
    tile: int,
    overlap: int,
    keep: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Decode codes (..., h, w) in square tiles, each fading into the next where they overlap.

    A decoder sees nothing beyond the border of a tile, so what it draws there counts for nothing: of the overlap, the
    outer quarter is left out and the two in the middle are blended.

    Args:
        decode: From a part of them to pictures (B, C, height * stride, width * stride).
        codes: Of the whole picture: indices, latents, or whatever has a cell for each.
        stride: Pixels per code and side.
        tile: Codes per side of a tile.
        overlap: Codes that neighbouring tiles share; more hides more of the border, and costs more.
        keep: Told before every tile how much of its pixels (H, W) counts; over all tiles it adds up to 1 everywhere.

    Raises:
        ValueError: If tiles would not get ahead.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} codes cannot overlap by {overlap}")
    height, width = codes.shape[-2:]
    down, across = (shares(length, tile, overlap, stride, codes.device) for length in (height, width))
    total: Tensor | None = None
    for top, rows in down.items():
        for left, columns in across.items():
            share = rows[:, None] * columns
            if keep is not None:
                keep(share)
            piece = decode(codes[..., top : top + tile, left : left + tile])
            if total is None:
                total = piece.new_zeros(*piece.shape[:2], height * stride, width * stride)
            place = (..., _span(top, piece.shape[2], stride), _span(left, piece.shape[3], stride))
            total[place] += piece * share.to(piece.dtype)
    assert total is not None
    return total


def shares(length: int, tile: int, overlap: int, stride: int, device: torch.device) -> dict[int, Tensor]:
    """Return by the start of every tile how much of each row, or column, of its pixels counts, in float64."""
    like = torch.ones((), dtype=torch.float64, device=device)
    weights = {start: fade(start, tile, overlap, length, stride, like) for start in starts(length, tile, overlap)}
    total = like.new_zeros(length * stride)
    for start, weight in weights.items():
        total[_span(start, len(weight), stride)] += weight
    return {start: weight / total[_span(start, len(weight), stride)] for start, weight in weights.items()}


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
