"""Pictures from files nobody vouches for, and the arithmetic of resizing, cropping and transparency.

A file may hold anything: only the formats listed here are decoded, none above a number of pixels, and
whatever a decoder trips over becomes one exception, `UnreadableError`.
"""

from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vqf.protocols import Size

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
MAX_PIXELS = 2**26
WASTE = 2.0  # how much larger a scaled picture may be than the part of it that stays
VECTORISED = ("AVX2", "AVX512")

ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableError(ValueError):
    """A file that is no picture, a broken one, or one too large to decode."""


def open_picture(source: Path | IO[bytes], size: Size | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture and turn it upright, as its EXIF orientation says; of an animation, the first frame.

    Args:
        source: A file's path or its content.
        size: Height and width that the picture is wanted at. A much larger JPEG is then decoded at a fraction
            of its size, at least twice the wanted one, which is several times faster.
        max_pixels: The most that is decoded, checked against the header.

    Raises:
        UnreadableError: With a reason in a few words.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise UnreadableError(f"{image.width} x {image.height} pixels, more than max_pixels={max_pixels}")
            if size is not None:
                _decode_small(image, size)
            image.load()
            upright = _upright(image)
            upright.format = image.format
            return upright
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # a decoder fed with garbage may raise anything
        raise UnreadableError(_reason(error)) from error


def read(
    source: Path | IO[bytes],
    size: Size,
    *,
    across: float = 0.5,
    down: float = 0.5,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Read a picture of any mode and size as float (3, H, W) in [-1, 1], transparency on white.

    It is scaled until it just covers `size`; what is too much on one side is cut off, `across` and `down`
    in [0, 1] saying where the part that stays begins, 0.5 being the centre.

    Raises:
        UnreadableError: See `open_picture`.
    """
    image = to_rgb(open_picture(source, size, max_pixels))
    if _whole_is_quick(image, size):
        return _to_unit(_cover_whole(image, size, across, down))
    return to_tensor(cover(image, size, across, down))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB; 16 bits are cut to 8, transparency is put on white.

    Raises:
        UnreadableError: For floating-point pictures, whose range no format states.
    """
    if image.mode == "F":
        raise UnreadableError("floating-point pixels, which have no agreed range")
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535)
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def cover(image: Image.Image, size: Size, across: float = 0.5, down: float = 0.5) -> Image.Image:
    """Scale an RGB picture until it just covers `size`, with antialiasing, and cut off what is too much.

    Only the part that stays is computed, so that no shape, however long, takes more memory than `size`. The cut
    falls between pixels of the result: a picture that needs no scaling is cut without any loss.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    left = _cut(image.width * scale - width, across) / scale
    top = _cut(image.height * scale - height, down) / scale
    box = (left, top, min(left + width / scale, image.width), min(top + height / scale, image.height))
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def to_tensor(image: Image.Image) -> Tensor:
    """Turn an RGB picture into float (3, H, W) in [-1, 1]."""
    return _to_unit(_pixels(image))


def premultiply(pixels: Tensor) -> Tensor:
    """Turn RGBA uint8 (4, H, W) into float in [0, 1], colour multiplied by opacity, as resizing needs it."""
    values = pixels.float() / 255
    return torch.cat([values[:3] * values[3:], values[3:]])


def contain(picture: Tensor, size: Size) -> Tensor:
    """Scale premultiplied RGBA (4, h, w) until it just fits into `size`, centred, nothing drawn around it."""
    height, width = size
    scale = min(height / picture.shape[1], width / picture.shape[2])
    inner = max(round(picture.shape[1] * scale), 1), max(round(picture.shape[2] * scale), 1)
    if inner != tuple(picture.shape[1:]):
        picture = F.interpolate(picture[None], size=inner, mode="bicubic", antialias=True)[0].clamp(0, 1)
        picture = torch.minimum(picture, picture[3:])  # a cubic overshoots; no colour exceeds its opacity
    left, top = (width - inner[1]) // 2, (height - inner[0]) // 2
    return F.pad(picture, (left, width - inner[1] - left, top, height - inner[0] - top))


def composite(picture: Tensor, color: tuple[float, ...]) -> Tensor:
    """Put premultiplied RGBA (4, H, W) on a colour in [0, 1]. -> (3, H, W) in [-1, 1]."""
    behind = torch.tensor(color).view(3, 1, 1) * (1 - picture[3:])
    return (picture[:3] + behind) * 2 - 1


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def _to_unit(pixels: Tensor) -> Tensor:
    return pixels.contiguous().float().div_(127.5).sub_(1)


def _whole_is_quick(image: Image.Image, size: Size) -> bool:
    """Say whether `_cover_whole` pays: it is vectorised for x86 only, and also computes what is cut off."""
    height, width = size
    area = max(height * image.width, width * image.height) ** 2 / (image.width * image.height)  # once scaled
    return area <= WASTE * height * width and torch.backends.cpu.get_cpu_capability() in VECTORISED


def _cover_whole(image: Image.Image, size: Size, across: float, down: float) -> Tensor:
    """Scale the whole picture and cut where `cover` does, three times as fast. -> uint8 (3, H, W).

    Within two levels of Pillow scaling the whole picture first across, then down: each of the passes rounds.
    Pillow by itself takes them in the order that costs less; where a cubic overshoots, that is some levels away.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    factor = scale * (1 + 1e-9)  # or rounding might take the last row
    scaled = F.interpolate(_pixels(image)[None], scale_factor=(factor, factor), mode="bicubic", antialias=True)[0]
    left, top = _cut(image.width * scale - width, across), _cut(image.height * scale - height, down)
    return scaled[:, top : top + height, left : left + width]


def _decode_small(image: Image.Image, size: Size) -> None:
    height, width = size
    if _orientation(image) >= 5:  # these values turn the picture by 90 degrees
        height, width = width, height
    scale = max(height / image.height, width / image.width)
    image.draft(None, (int(np.ceil(2 * scale * image.width)), int(np.ceil(2 * scale * image.height))))


def _upright(image: Image.Image) -> Image.Image:
    turn = UPRIGHT.get(_orientation(image))
    return image.transpose(turn) if turn is not None else image.copy()


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF data does not make a picture unreadable
        return 1
    return value if isinstance(value, int) else 1


def _cut(room: float, place: float) -> int:
    """Pick one of the whole numbers from 0 to `room`; `place` 0.5 is the middle one."""
    steps = int(room + 1e-6)
    return min(int(place * (steps + 1)), steps)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a picture of a known format ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__
