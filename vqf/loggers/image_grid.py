"""Grids of images that can be split again."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

COLUMNS = 8
SMALL_SIDE = 128  # pixels; smaller images are enlarged twice
GAP = 4  # white pixels around every image
LAYOUT_KEY = "vqf-grid"  # the text chunk of a PNG file with the layout of the grid

# What Pillow and a wrong layout raise; Pillow raises a SyntaxError for a broken PNG file.
GRID_ERRORS = (OSError, ValueError, LookupError, TypeError, SyntaxError, OverflowError, MemoryError, RecursionError)

# Successive images that belong together, such as original and reconstruction, by the name they are logged under.
IMAGES_PER_ITEM = {"reconstructions": 2, "best": 2, "worst": 2, "conditions": 2, "completions": 3}


def images_per_item(name: str) -> int:
    """Return how many images belong together."""
    return IMAGES_PER_ITEM.get(name.partition("-")[0], 1)


def grid_columns(name: str) -> int:
    """Return the images in a row, at most `COLUMNS`."""
    return COLUMNS - COLUMNS % images_per_item(name)


def make_grid(images: Tensor, columns: int = COLUMNS) -> Image.Image:
    """Lay images (B, 3, H, W) in [-1, 1] out row by row."""
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    scale = _scale(images)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    columns = min(columns, len(pixels))
    missing = -len(pixels) % columns
    tiles = F.pad(pixels, (0, GAP, 0, GAP, 0, 0, 0, missing), value=255)  # right, below; white tiles at the end
    grid = rearrange(tiles, "(rows columns) c h w -> (rows h) (columns w) c", columns=columns)
    grid = F.pad(grid, (0, 0, GAP, 0, GAP, 0), value=255)
    return Image.fromarray(grid.numpy())


def save_grid(images: Tensor, path: Path, columns: int = COLUMNS) -> None:
    """Write a PNG file that `split_grid` can read."""
    layout = {
        "count": len(images),
        "columns": min(columns, len(images)),
        "height": images.shape[2],
        "width": images.shape[3],
        "scale": _scale(images),
    }
    info = PngInfo()
    info.add_text(LAYOUT_KEY, json.dumps(layout))
    make_grid(images, columns).save(path, pnginfo=info)


def split_grid(path: Path) -> list[Image.Image]:
    """Return the images of a grid; a file without a layout is one image.

    Raises:
        *GRID_ERRORS: If the file is damaged.
    """
    with Image.open(path, formats=["PNG"]) as grid:
        grid.load()
        if LAYOUT_KEY not in grid.info:
            return [grid.convert("RGB")]
        layout = json.loads(grid.info[LAYOUT_KEY])
    scale, size = layout["scale"], (layout["width"], layout["height"])
    images = []
    for i in range(layout["count"]):
        row, column = divmod(i, layout["columns"])
        left, top = GAP + column * (size[0] * scale + GAP), GAP + row * (size[1] * scale + GAP)
        tile = grid.crop((left, top, left + size[0] * scale, top + size[1] * scale))
        images.append(tile.resize(size, Image.Resampling.NEAREST))
    return images


def _scale(images: Tensor) -> int:
    return 2 if max(images.shape[2:]) < SMALL_SIDE else 1
