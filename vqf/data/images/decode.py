"""Images from files nobody vouches for, and the arithmetic of transparency.

A file may hold anything: only the formats listed here are decoded, none above a number of pixels, and
whatever a decoder trips over becomes one exception, `UnreadableError`.
"""

import io
import math
import warnings
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vqf.batch import Size
from vqf.data.images.augment import CENTER_CROP, Resize, ViewParams
from vqf.data.images.resize import Box, DecodedExtent, compute_crop_box, crop_and_resize

Animated = Literal["refuse", "first"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP")  # the pages of a TIFF, and the previews in a JPEG of a phone, are no frames
MAX_PIXELS = 2**26
DRAFT_MARGIN = (
    3  # times the wanted size that a JPEG is decoded at, at least; what that changes is in docs/data.md, measured
)

EXIF_ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
EXIF_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ROTATED_90 = (5, 6, 7, 8)  # by 90 degrees
REVERSED_COLUMNS, REVERSED_ROWS = (
    (2, 3, 6, 7),
    (3, 4, 7, 8),
)  # where the last pixels of a row or column are, once it is upright


# `max_pixels` is checked against the header of every image, and is stricter.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableError(ValueError):
    """A file that is no image, a broken one, or one too large to decode."""


class CroppedImage(NamedTuple):
    """A part of an image, and which one it is."""

    image: Tensor  # (3, H, W) float in [-1, 1]
    box: Box  # in pixels of the whole
    shape: Size  # rows and columns of the whole, as it is stored

    @property
    def crop_box(self) -> Tensor:
        """Top, left, bottom and right (4,) as shares of the whole."""
        return self.box.normalized(self.shape)


def open_image(
    source: Path | IO[bytes],
    size: Size | None = None,
    max_pixels: int = MAX_PIXELS,
    *,
    view: ViewParams = CENTER_CROP,
    animated: Animated = "first",
) -> Image.Image:
    """Decode an image and turn it upright, as its EXIF orientation says.

    Args:
        source: A file's path or its content.
        size: Height and width at which what `view` shows is wanted. A much larger JPEG is then decoded at a fraction
            of its size, at least `DRAFT_MARGIN` times the wanted one, which is faster.
        max_pixels: The most that is decoded, checked against the header.
        view: What will be shown of it.
        animated: Whether an animation is refused, or its first frame taken.

    Raises:
        UnreadableError: With a reason in a few words.
    """
    return _decode(source, size, max_pixels, view, animated)[0]


def read_crop(
    source: Path | IO[bytes],
    size: Size,
    view: ViewParams = CENTER_CROP,
    *,
    resize: Resize = "antialias",
    max_pixels: int = MAX_PIXELS,
    animated: Animated = "first",
) -> CroppedImage:
    """Read the part of an image of any mode and size that a view shows, transparency on white.

    Raises:
        UnreadableError: See `open_image`.
    """
    roughly = size if resize == "antialias" else None  # cv2 has to see every pixel
    image, extent = _decode(source, roughly, max_pixels, view, animated)
    pixels = normalize_pixels(crop_and_resize(to_rgb(image), size, view, resize, extent))
    return CroppedImage(pixels, compute_crop_box(extent.shape, size, view, resize), extent.shape)


def image_format(content: bytes) -> str:
    """Return the format of an image by its header; what a phone puts previews into is the JPEG that it begins with.

    Raises:
        UnreadableError: With a reason in a few words.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return _format(image) or "?"
    except Exception as error:  # see `_decode`
        raise UnreadableError(_reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; 16 bits are cut to 8, transparency is put on white.

    Raises:
        UnreadableError: For floating-point images, whose range no format states.
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


def to_tensor(image: Image.Image) -> Tensor:
    """Turn an RGB image into float (3, H, W) in [-1, 1]."""
    return normalize_pixels(torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1))


def normalize_pixels(pixels: Tensor) -> Tensor:
    """Turn levels, uint8 (C, H, W), into float in [-1, 1]."""
    return pixels.contiguous().float().div_(127.5).sub_(1)


def premultiply(pixels: Tensor) -> Tensor:
    """Turn RGBA uint8 (4, H, W) into float in [0, 1], colour multiplied by opacity, as resizing needs it."""
    values = pixels.float() / 255
    return torch.cat([values[:3] * values[3:], values[3:]])


def contain(image: Tensor, size: Size) -> Tensor:
    """Scale premultiplied RGBA (4, h, w) until it just fits into `size`, centred, nothing drawn around it."""
    height, width = size
    scale = min(height / image.shape[1], width / image.shape[2])
    inner = max(round(image.shape[1] * scale), 1), max(round(image.shape[2] * scale), 1)
    if inner != tuple(image.shape[1:]):
        image = F.interpolate(image[None], size=inner, mode="bicubic", antialias=True)[0].clamp(0, 1)
        image = torch.minimum(image, image[3:])  # a cubic overshoots; no colour exceeds its opacity
    left, top = (width - inner[1]) // 2, (height - inner[0]) // 2
    return F.pad(image, (left, width - inner[1] - left, top, height - inner[0] - top))


def composite(image: Tensor, color: tuple[float, ...]) -> Tensor:
    """Put premultiplied RGBA (4, H, W) on a colour in [0, 1]. -> (3, H, W) in [-1, 1]."""
    behind = torch.tensor(color).view(3, 1, 1) * (1 - image[3:])
    return (image[:3] + behind) * 2 - 1


def _decode(
    source: Path | IO[bytes], size: Size | None, max_pixels: int, view: ViewParams, animated: Animated
) -> tuple[Image.Image, DecodedExtent]:
    """Return an image upright, and how what is stored lies in it."""
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise UnreadableError(f"{image.width} x {image.height} pixels, more than max_pixels={max_pixels}")
            if animated == "refuse" and image.format in ANIMATED_FORMATS and getattr(image, "is_animated", False):
                raise UnreadableError("animated; data.animated=first takes the first frame")
            stored = _upright_shape(image)
            factor = 1 if size is None else _draft_jpeg(image, compute_crop_box(stored, size, view), size)
            image.load()
            upright = _transpose_upright(image)
            upright.format = _format(image)
            return upright, _decoded_extent(stored, factor, upright, _orientation(image))
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # a decoder fed with garbage may raise anything
        raise UnreadableError(_reason(error)) from error


def _format(image: Image.Image) -> str | None:
    return "JPEG" if image.format == "MPO" else image.format


def _draft_jpeg(image: Image.Image, box: Box, size: Size) -> int:
    """Have a JPEG decoded at a fraction of its size, if a part of it is wanted that small; returns which."""
    scale = DRAFT_MARGIN * max(size[0] / (box.bottom - box.top), size[1] / (box.right - box.left))
    width, wanted = image.width, (math.ceil(scale * image.width), math.ceil(scale * image.height))
    done = image.draft(None, wanted)
    return 1 if done is None else round(width / done[1][2])  # what the image fills of a row; image.width is rounded


def _decoded_extent(stored: Size, factor: int, upright: Image.Image, orientation: int) -> DecodedExtent:
    top, left = upright.height - stored[0] / factor, upright.width - stored[1] / factor
    return DecodedExtent(stored, factor, top * (orientation in REVERSED_ROWS), left * (orientation in REVERSED_COLUMNS))


def _upright_shape(image: Image.Image) -> Size:
    """Return rows and columns of an image once it is upright."""
    return (image.width, image.height) if _orientation(image) in ROTATED_90 else (image.height, image.width)


def _transpose_upright(image: Image.Image) -> Image.Image:
    turn = EXIF_TRANSPOSE.get(_orientation(image))
    return image.transpose(turn) if turn is not None else image.copy()


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # broken EXIF data does not make an image unreadable
        return 1
    return value if isinstance(value, int) else 1


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than Pillow opens at all, 178956970"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__
