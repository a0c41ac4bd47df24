"""Pictures side by side in one file, and each of them again out of it."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

COLUMNS = 8
SMALL = 128  # pixels; smaller pictures are drawn twice as large
GAP = 4  # white pixels around every picture
LAYOUT = "vqf-grid"  # the text of a PNG file that says how its pictures lie

# How many pictures in turn belong together, by the name under which they are shown.
TOGETHER = {"reconstructions": 2, "best": 2, "worst": 2, "conditions": 2, "completions": 3}


def together(name: str) -> int:
    """Return how many pictures belong together; "conditions-map" are shown as "conditions" are."""
    return TOGETHER.get(name.partition("-")[0], 1)


def columns_of(name: str) -> int:
    """Return how many pictures stand in a row, so that what belongs together is not parted."""
    return COLUMNS - COLUMNS % together(name)


def grid(images: Tensor, columns: int = COLUMNS) -> Image.Image:
    """Lay pictures (B, 3, H, W) in [-1, 1] out row by row, rounded to 8 bits."""
    pictures = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    scale = _scale(images)
    pictures = pictures.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    columns = min(columns, len(pictures))
    missing = -len(pictures) % columns
    tiles = F.pad(pictures, (0, GAP, 0, GAP, 0, 0, 0, missing), value=255)
    sheet = rearrange(tiles, "(rows columns) c h w -> (rows h) (columns w) c", columns=columns)
    sheet = F.pad(sheet, (0, 0, GAP, 0, GAP, 0), value=255)
    return Image.fromarray(sheet.numpy())


def save_grid(images: Tensor, path: Path, columns: int = COLUMNS) -> None:
    """Write a grid as a PNG file that `cut` can take apart."""
    layout = {
        "count": len(images),
        "columns": min(columns, len(images)),
        "height": images.shape[2],
        "width": images.shape[3],
        "scale": _scale(images),
    }
    info = PngInfo()
    info.add_text(LAYOUT, json.dumps(layout))
    grid(images, columns).save(path, pnginfo=info)


def cut(path: Path) -> list[Image.Image]:
    """Return the pictures of a grid in their own size; the whole file as one where it does not say how they lie."""
    with Image.open(path, formats=["PNG"]) as sheet:
        sheet.load()
        if LAYOUT not in sheet.info:
            return [sheet.convert("RGB")]
        layout = json.loads(sheet.info[LAYOUT])
    scale, size = layout["scale"], (layout["width"], layout["height"])
    found = []
    for i in range(layout["count"]):
        row, column = divmod(i, layout["columns"])
        left, top = (GAP + place * (side * scale + GAP) for place, side in zip((column, row), size, strict=True))
        cell = sheet.crop((left, top, left + size[0] * scale, top + size[1] * scale))
        found.append(cell.resize(size, Image.Resampling.NEAREST))
    return found


def _scale(images: Tensor) -> int:
    return 2 if max(images.shape[2:]) < SMALL else 1
