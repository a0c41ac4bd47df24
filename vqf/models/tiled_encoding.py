"""Tiled encoding of large images, to bound the memory.

Tiles overlap; of each, the cells are kept that lie `margin` or more from its borders inside the image. On a line of 10
cells, with tiles of 6 and a margin of 1::

    tile 0    0 1 2 3 4 .                 cells 4 and 5 are in both tiles;
    tile 1            . 5 6 7 8 9         each is taken from the tile whose border is farther away
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vqf.models.tiled_decoding import MAX_GLOBAL_CELLS, GlobalGroupNorm, tile_starts
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import TiledEncoding

TILE_PIXELS = 1024  # side of a tile
# Cells. The layers that run in tiles see less than 5 beyond a border in VQGAN's encoders; all layers, less than 16.
MARGIN, MARGIN_OF_ALL_LAYERS = 8, 16


def largest_tile(tokenizer: Tokenizer) -> int:
    """Cells per side of the tiles in which large images are encoded and decoded."""
    return max(TILE_PIXELS // cell_stride(tokenizer), 2 * MARGIN_OF_ALL_LAYERS + 1)


@torch.no_grad()
def encode_tiled(tokenizer: Tokenizer, images: Tensor, tile: int) -> Tensor:
    """Encode images (B, C, H, W) to indices (B, h, w) with at most `tile` cells per side in full resolution.

    Images of one tile are encoded in one piece. Of larger ones, group norms have the statistics of the full image.

    Raises:
        UserError: As `Tokenizer.encode`.
    """
    stride = cell_stride(tokenizer)
    if max(images.shape[2:]) <= tile * stride:
        return tokenizer.encode(images)
    images = tokenizer.check_images(images).to(tokenizer.device, tokenizer.dtype)
    encoder = tokenizer.encoder
    if isinstance(encoder, TiledEncoding) and images.shape[2:].numel() <= MAX_GLOBAL_CELLS * stride**2:
        cells = _encode_converged(tokenizer, encoder.local_features, images, tile, MARGIN)
        latents = encoder.global_features(cells)
    else:
        latents = _encode_converged(tokenizer, encoder, images, tile, MARGIN_OF_ALL_LAYERS)
    # Every cell has its own code: rows of cells need less memory than all of them.
    return torch.cat([tokenizer.quantize_latents(rows).indices for rows in latents.split(tile, dim=2)], dim=1)


def _encode_converged(
    tokenizer: Tokenizer, encode: Callable[[Tensor], Tensor], images: Tensor, tile: int, margin: int
) -> Tensor:
    norms = GlobalGroupNorm(tokenizer)
    tiles = (images, cell_stride(tokenizer), tile, margin)
    for passes in itertools.count(1):
        with norms.collecting():
            for _ in encoded_tiles(encode, *tiles, set_weight=norms.set_weight):
                pass
        if norms.converged(passes):
            break
    with norms.frozen():
        return encode_tiles(encode, *tiles)


def encode_tiles(encode: Callable[[Tensor], Tensor], images: Tensor, stride: int, tile: int, margin: int) -> Tensor:
    """Encode images (B, C, H, W) in tiles to cells (B, D, h, w).

    Args:
        encode: Maps (B, C, H, W) to (B, D, H / stride, W / stride).
        tile: Cells per side of a tile.
        margin: Cells that a tile sees beyond those that are kept of it, below tile / 2.
    """
    rows: dict[int, list[Tensor]] = {}
    for top, cells in encoded_tiles(encode, images, stride, tile, margin):
        rows.setdefault(top, []).append(cells)
    return torch.cat([torch.cat(row, dim=3) for row in rows.values()], dim=2)


def encoded_tiles(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    stride: int,
    tile: int,
    margin: int,
    set_weight: Callable[[Tensor], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the kept cells of each tile, row by row of tiles.

    Args:
        set_weight: Called before each tile with the weight (H, W) of its pixels: 1 where its cells are kept, else 0.
    """
    height, width = (length // stride for length in images.shape[2:])
    for (top, kept_rows), (left, kept_columns) in itertools.product(
        kept_cells(height, tile, margin).items(), kept_cells(width, tile, margin).items()
    ):
        pixels = images[..., top * stride : (top + tile) * stride, left * stride : (left + tile) * stride]
        if set_weight is not None:
            weight = torch.zeros(pixels.shape[2:], dtype=torch.float64, device=images.device)
            weight[_scaled(kept_rows, stride), _scaled(kept_columns, stride)] = 1
            set_weight(weight)
        yield top, encode(pixels)[..., kept_rows, kept_columns]


def kept_cells(length: int, tile: int, margin: int) -> dict[int, slice]:
    """The cells that are kept of each tile on a line, counted in the tile, by its start; together, every cell once."""
    starts = tile_starts(length, tile, 2 * margin)
    borders = [0, *((start + tile + following) // 2 for start, following in itertools.pairwise(starts)), length]
    return {
        start: slice(first - start, end - start)
        for start, (first, end) in zip(starts, itertools.pairwise(borders), strict=True)
    }


def cell_stride(tokenizer: Tokenizer) -> int:
    """Pixels per cell and side, of a tokenizer whose codes have places in images of any size."""
    assert tokenizer.stride is not None and len(tokenizer.layout.scales) == 1
    return tokenizer.stride


def _scaled(cells: slice, stride: int) -> slice:
    return slice(cells.start * stride, cells.stop * stride)
