"""Pictures in and out of files, for pipelines."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from vqf.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # what a person draws in, and no more
MAX_PIXELS = 2**26


def to_image(picture: Tensor) -> Image.Image:
    """Turn a picture (C, H, W) in [-1, 1] into an 8-bit one, rounded to the nearest; see `as_colours`."""
    pixels = ((as_colours(picture[None])[0].float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy())


def as_colours(pictures: Tensor) -> Tensor:
    """Return pictures (B, C, H, W) of any channels in colours, (B, 3, H, W) in [-1, 1].

    One channel is grey. More than three are the scores of classes, of which the best is shown in a colour of its own.
    """
    if pictures.shape[1] == 1:
        return pictures.expand(-1, 3, -1, -1)
    if pictures.shape[1] == 3:
        return pictures
    # Steps of the golden ratio around the circle of hues: neighbours in number are far apart in colour.
    hues = torch.arange(pictures.shape[1], device=pictures.device) * 0.618034 % 1
    palette = ((hues[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0], device=hues.device)) % 6 - 3).abs() - 1
    return rearrange(palette.clamp(0, 1)[pictures.argmax(1)] * 2 - 1, "b h w c -> b c h w")


def read_picture(path: Path, channels: int, stride: int = 1) -> Tensor:
    """Read a picture (C, H, W) in [-1, 1], its sides scaled to the nearest multiples of a stride.

    Args:
        path: Of the file.
        channels: 3: its colours; 1: its grey; more: 1 in the channel of each pixel's number, 0 in all others.
        stride: What divides both sides afterwards. Nearest-neighbour scaling keeps the colours that a map is drawn in.

    Raises:
        UserError: If there is no picture, or a pixel's number has no channel.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            width, height = (max(round(side / stride), 1) * stride for side in file.size)
            if width * height > MAX_PIXELS:
                raise UserError(f"{path}: {file.width} x {file.height} pixels are more than {MAX_PIXELS:,}")
            mode = {3: "RGB", 1: "L"}.get(channels, file.mode if file.mode in ("P", "L") else "L")
            pixels = torch.from_numpy(np.array(file.convert(mode).resize((width, height), Image.Resampling.NEAREST)))
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # whatever a decoder trips over
        raise UserError(f"{path}: no picture that can be read ({error}); give a {' or '.join(FORMATS)} file") from error
    if channels > 3:
        return _one_hot(path, pixels, channels)
    return rearrange(pixels, "h w ... -> (...) h w").float() / 127.5 - 1


def _one_hot(path: Path, numbers: Tensor, classes: int) -> Tensor:
    if numbers.max() >= classes:
        raise UserError(f"{path}: a pixel is of class {int(numbers.max())}; there are {classes}, counted from 0")
    return rearrange(torch.nn.functional.one_hot(numbers.long(), classes), "h w c -> c h w").float()


def save_pictures(pictures: Iterable[Tensor], folder: Path, names: Iterable[str]) -> None:
    """Write pictures (C, H, W) as PNG files of the given names into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture, name in zip(pictures, names, strict=True):
        temporary = folder / f".{name}.tmp"
        to_image(picture).save(temporary, format="PNG")
        temporary.rename(folder / f"{name}.png")  # what is there is whole, whatever happens
