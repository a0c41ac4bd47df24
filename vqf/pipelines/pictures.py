"""Pictures in and out of files, for pipelines."""

from collections.abc import Iterable
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor


def to_image(picture: Tensor) -> Image.Image:
    """Turn a picture (3, H, W) in [-1, 1] into an 8-bit one, rounded to the nearest."""
    pixels = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy())


def save_pictures(pictures: Iterable[Tensor], folder: Path, names: Iterable[str]) -> None:
    """Write pictures (3, H, W) as PNG files of the given names into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture, name in zip(pictures, names, strict=True):
        to_image(picture).save(folder / f"{name}.png")
