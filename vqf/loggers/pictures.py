"""Pictures side by side."""

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

COLUMNS = 8  # even, so that pictures that come in pairs stay beside each other
SMALL = 128  # pixels; smaller pictures are drawn twice as large
GAP = 4  # white pixels around every picture


def grid(images: Tensor, columns: int = COLUMNS) -> Image.Image:
    """Lay pictures (B, 3, H, W) in [-1, 1] out row by row, rounded to 8 bits."""
    pictures = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    if max(pictures.shape[2:]) < SMALL:
        pictures = pictures.repeat_interleave(2, 2).repeat_interleave(2, 3)
    columns = min(columns, len(pictures))
    missing = -len(pictures) % columns
    tiles = F.pad(pictures, (0, GAP, 0, GAP, 0, 0, 0, missing), value=255)
    sheet = rearrange(tiles, "(rows columns) c h w -> (rows h) (columns w) c", columns=columns)
    sheet = F.pad(sheet, (0, 0, GAP, 0, GAP, 0), value=255)
    return Image.fromarray(sheet.numpy())
