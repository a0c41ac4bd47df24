"""Images side by side in one file, and each of them again out of it."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

COLUMNS = 8
SMALL_SIDE = 128  # pixels; smaller images are drawn twice as large
GAP = 4  # white pixels around every image
LAYOUT_KEY = "vqf-grid"  # the text of a PNG file that says how its images lie

# How many images in turn belong together, by the name under which they are shown.
IMAGES_PER_ITEM = {"reconstructions": 2, "best": 2, "worst": 2, "conditions": 2, "completions": 3}


def images_per_item(name: str) -> int:
    """Return how many images belong together; "conditions-map" are shown as "conditions" are."""
    return IMAGES_PER_ITEM.get(name.partition("-")[0], 1)


def grid_columns(name: str) -> int:
    """Return how many images stand in a row, so that what belongs together is not parted."""
    return COLUMNS - COLUMNS % images_per_item(name)


def make_grid(images: Tensor, columns: int = COLUMNS) -> Image.Image:
    """Lay images (B, 3, H, W) in [-1, 1] out row by row, rounded to 8 bits."""
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    scale = _scale(images)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    columns = min(columns, len(pixels))
    missing = -len(pixels) % columns
    tiles = F.pad(pixels, (0, GAP, 0, GAP, 0, 0, 0, missing), value=255)
    sheet = rearrange(tiles, "(rows columns) c h w -> (rows h) (columns w) c", columns=columns)
    sheet = F.pad(sheet, (0, 0, GAP, 0, GAP, 0), value=255)
    return Image.fromarray(sheet.numpy())


def save_grid(images: Tensor, path: Path, columns: int = COLUMNS) -> None:
    """Write a grid as a PNG file that `split_grid` can take apart."""
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
    """Return the images of a grid in their own size; the whole file as one where it does not say how they lie."""
    with Image.open(path, formats=["PNG"]) as sheet:
        sheet.load()
        if LAYOUT_KEY not in sheet.info:
            return [sheet.convert("RGB")]
        layout = json.loads(sheet.info[LAYOUT_KEY])
    scale, size = layout["scale"], (layout["width"], layout["height"])
    found = []
    for i in range(layout["count"]):
        row, column = divmod(i, layout["columns"])
        left, top = (GAP + place * (side * scale + GAP) for place, side in zip((column, row), size, strict=True))
        cell = sheet.crop((left, top, left + size[0] * scale, top + size[1] * scale))
        found.append(cell.resize(size, Image.Resampling.NEAREST))
    return found


def _scale(images: Tensor) -> int:
    return 2 if max(images.shape[2:]) < SMALL_SIDE else 1
