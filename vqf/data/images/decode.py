"""Decode untrusted image files of `FORMATS`."""

import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqf.batch import Size
from vqf.data.images.augment import CENTER_CROP, Resize, ViewParams
from vqf.data.images.pixel_values import PixelRange, UnreadableError, ValueLimits, is_deep, to_grey, value_limits
from vqf.data.images.png_text import without_text
from vqf.data.images.resize import Box, DecodedExtent, compute_crop_box, crop_and_resize
from vqf.file_kinds import check_regular

T = TypeVar("T")
Animated = Literal["refuse", "first"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp")  # the last four of browsers and phones
EXTENSIONS = (*JPEG_EXTENSIONS, ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP")  # the pages of a TIFF and the previews in a phone's JPEG are not frames
MAX_PIXELS = 2**26
# A JPEG is decoded at a reduced size of at least this many times the wanted one. The error is measured in docs/data.md.
DRAFT_MARGIN = 3

EXIF_ORIENTATION = 0x0112  # the EXIF tag
EXIF_TRANSPOSE = {  # what undoes each value
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ROTATED_90 = (5, 6, 7, 8)  # by 90 degrees: width and height are swapped
# Values for which the last stored pixels come first in the upright image.
REVERSED_COLUMNS = (2, 3, 6, 7)
REVERSED_ROWS = (3, 4, 7, 8)


# `max_pixels` is checked against the header of every image, and is stricter.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class CroppedImage(NamedTuple):
    """A crop, and where in its image it lies."""

    image: Tensor  # (3, H, W) float in [-1, 1]
    box: Box  # in pixels of the full image
    shape: Size  # (H, W) of the full image, upright
    values: ValueLimits | None = None  # of the full image, if it is gray with more than 8 bits

    @property
    def crop_box(self) -> Tensor:
        """Top, left, bottom and right (4,) as fractions of the full image."""
        return self.box.normalized(self.shape)


def open_image(
    source: Path | IO[bytes],
    size: Size | None = None,
    max_pixels: int = MAX_PIXELS,
    *,
    view: ViewParams = CENTER_CROP,
    animated: Animated = "first",
) -> Image.Image:
    """Decode an image and turn it upright by its EXIF orientation.

    Args:
        size: (H, W) of the resized crop; a JPEG may be decoded at a reduced size, at least `DRAFT_MARGIN` times this.
        max_pixels: Largest width times height that is decoded.

    Raises:
        UnreadableError: With a short reason.
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
    pixel_range: PixelRange | None = None,
) -> CroppedImage:
    """Read the crop that a view shows, transparency on white.

    Args:
        pixel_range: As in `to_rgb`.

    Raises:
        UnreadableError: As in `open_image`.
    """
    draft_size = size if resize == "antialias" else None  # cv2 needs every pixel
    image, extent = _decode(source, draft_size, max_pixels, view, animated)
    pixels = normalize_pixels(crop_and_resize(to_rgb(image, pixel_range), size, view, resize, extent))
    box = compute_crop_box(extent.shape, size, view, resize)
    return CroppedImage(pixels, box, extent.shape, value_limits(image))


def image_format(content: bytes) -> str:
    """Return the format of an image from its header; MPO is JPEG.

    Raises:
        UnreadableError: If it is unknown.
    """
    return _with_image(io.BytesIO(content), lambda image: _format(image) or "?")


def to_rgb(image: Image.Image, pixel_range: PixelRange | None = None, option: str = "data.range") -> Image.Image:
    """Convert an image to 8-bit RGB, transparency on white.

    Args:
        pixel_range: The values that become black and white in a gray image of more than 8 bits; by default 0 and 65535.
        option: Name of that option, for messages.

    Raises:
        UnreadableError: If pixels are not in the default range, or are floating-point numbers and there is none.
    """
    if is_deep(image):
        return to_grey(image, pixel_range, option).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to float (3, H, W) in [-1, 1]."""
    return normalize_pixels(torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1))


def normalize_pixels(pixels: Tensor) -> Tensor:
    """Convert uint8 (C, H, W) to float in [-1, 1]."""
    return pixels.contiguous().float().div_(127.5).sub_(1)


def _decode(
    source: Path | IO[bytes], size: Size | None, max_pixels: int, view: ViewParams, animated: Animated
) -> tuple[Image.Image, DecodedExtent]:
    def decode(image: Image.Image) -> tuple[Image.Image, DecodedExtent]:
        if image.width * image.height > max_pixels:
            raise UnreadableError(f"{image.width} x {image.height} pixels, more than max_pixels={max_pixels}")
        if animated == "refuse" and image.format in ANIMATED_FORMATS and getattr(image, "is_animated", False):
            raise UnreadableError("animated; data.animated=first takes the first frame")
        shape = _upright_shape(image)
        factor = 1 if size is None else _draft_jpeg(image, compute_crop_box(shape, size, view), size)
        image.load()
        upright = _transpose_upright(image)
        upright.format = _format(image)
        return upright, _decoded_extent(shape, factor, upright, _orientation(image))

    return _with_image(source, decode)


def _with_image(source: Path | IO[bytes], use: Callable[[Image.Image], T], with_text: bool = True) -> T:
    """Open an image, again without its text if that is what makes it unreadable."""
    try:
        if isinstance(source, Path):
            check_regular(source)
        with Image.open(source, formats=FORMATS) as image:
            return use(image)
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # a decoder may raise anything on garbage
        shorter = without_text(source) if with_text and not isinstance(error, OSError) else None
        if shorter is None:
            raise UnreadableError(_reason(error)) from error
    return _with_image(shorter, use, with_text=False)


def _format(image: Image.Image) -> str | None:
    return "JPEG" if image.format == "MPO" else image.format


def _draft_jpeg(image: Image.Image, box: Box, size: Size) -> int:
    """Decode at 1/2, 1/4 or 1/8 if possible; return the factor."""
    scale = DRAFT_MARGIN * max(size[0] / (box.bottom - box.top), size[1] / (box.right - box.left))
    width, wanted = image.width, (math.ceil(scale * image.width), math.ceil(scale * image.height))
    draft = image.draft(None, wanted)
    return 1 if draft is None else round(width / draft[1][2])  # not image.width, which is rounded up to whole pixels


def _decoded_extent(shape: Size, factor: int, upright: Image.Image, orientation: int) -> DecodedExtent:
    top, left = upright.height - shape[0] / factor, upright.width - shape[1] / factor
    return DecodedExtent(shape, factor, top * (orientation in REVERSED_ROWS), left * (orientation in REVERSED_COLUMNS))


def _upright_shape(image: Image.Image) -> Size:
    return (image.width, image.height) if _orientation(image) in ROTATED_90 else (image.height, image.width)


def _transpose_upright(image: Image.Image) -> Image.Image:
    transpose = EXIF_TRANSPOSE.get(_orientation(image))
    return image.transpose(transpose) if transpose is not None else image.copy()


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
