"""Crop and resize images, the same to the bit on every machine."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vqf.batch import Size
from vqf.data.images.augment import CENTER_CROP, Resize, ViewParams

MAX_OVERSIZE = 2.0  # pixels of the resized full image per pixel of the crop, up to which resizing all of it is faster
CV2_WEIGHT_BITS = 11  # precision of the interpolation weights in OpenCV

WeightedIndices = tuple[Tensor, Tensor]  # pixel indices and their weights, in units of 2**-CV2_WEIGHT_BITS


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def scale_by(self, y_scale: float, x_scale: float) -> "Box":
        return Box(self.left * x_scale, self.top * y_scale, self.right * x_scale, self.bottom * y_scale)

    def normalized(self, shape: Size) -> Tensor:
        """Return top, left, bottom, right (4,) as fractions of height and width."""
        rows, columns = shape
        return torch.tensor([self.top / rows, self.left / columns, self.bottom / rows, self.right / columns])


class DecodedExtent(NamedTuple):
    """Where a full-size image lies in the pixels of its reduced JPEG decoding.

    Sizes round up: 1025 pixels at 1/2 become 513, of which the last, or the first if mirrored, is half full.
    """

    shape: Size  # (H, W) of the full-size image
    factor: int = 1  # full-size pixels per decoded pixel, along each axis
    top: float = 0.0  # where the image begins, in decoded pixels
    left: float = 0.0

    def to_decoded(self, box: Box) -> Box:
        reduced = box.scale_by(1 / self.factor, 1 / self.factor)
        left, top = self.left, self.top
        return Box(reduced.left + left, reduced.top + top, reduced.right + left, reduced.bottom + top)


def compute_crop_box(shape: Size, size: Size, view: ViewParams = CENTER_CROP, resize: Resize = "antialias") -> Box:
    """Return the box of an image of `shape` (H, W) that a view resizes to `size` (H, W).

    Without regions, the crop starts at a pixel of the result; a region starts and ends at pixels of the image.
    """
    if view.regions:
        return _resized_crop_box(shape, size, view)
    (rows, columns), (height, width) = shape, size
    scaled_height, scaled_width = _covering_size(shape, size, resize)
    top, left = crop_offset(scaled_height - height, view.crop_y), crop_offset(scaled_width - width, view.crop_x)
    x_scale, y_scale = columns / scaled_width, rows / scaled_height
    right, bottom = min((left + width) * x_scale, columns), min((top + height) * y_scale, rows)
    return Box(left * x_scale, top * y_scale, right, bottom)


def crop_and_resize(
    image: Image.Image,
    size: Size,
    view: ViewParams = CENTER_CROP,
    resize: Resize = "antialias",
    extent: DecodedExtent | None = None,
) -> Tensor:
    """Crop and resize an RGB image: uint8 (3, H, W).

    "antialias" is Pillow's bicubic to within two of 255 levels; "cv2" is OpenCV's bilinear, bit for bit.

    Args:
        size: (H, W) of the result.
        extent: Where the full-size image lies in `image`, by default everywhere.
    """
    extent = extent or DecodedExtent((image.height, image.width))
    box = compute_crop_box(extent.shape, size, view, resize)
    if view.regions and extent.factor == 1:
        region = _pixels(image.crop(box))
        return _cv2_bilinear(region, size) if resize == "cv2" else _bicubic(region, size)
    if resize == "cv2":
        return _cv2_resize_then_crop(_pixels(image), size, view)
    if not view.regions and extent.top == extent.left == 0 and _full_resize_is_faster(extent.shape, size):
        return _resize_then_crop(_pixels(image), size, view, extent)
    return _pixels(resize_box(image, size, extent.to_decoded(box)))


def resize_box(
    image: Image.Image, size: Size, box: Box, filter: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Crop and resize an image with Pillow, antialiased unless NEAREST."""
    return image.resize(size[::-1], filter, box=box)


def crop_offset(slack: float, position: float | None) -> int:
    """Convert a position in [0, 1] to an integer in 0..slack, each equally likely; None is the center, rounded down."""
    steps = int(slack + 1e-6)  # a slack of 1 may have been computed as 0.9999999
    return steps // 2 if position is None else min(int(position * (steps + 1)), steps)


def _resized_crop_box(shape: Size, size: Size, view: ViewParams) -> Box:
    rows, columns = shape
    aspect = size[1] / size[0]
    for area, ratio in view.regions:
        width = round(math.sqrt(rows * columns * area * ratio * aspect))
        height = round(math.sqrt(rows * columns * area / (ratio * aspect)))
        if 0 < width <= columns and 0 < height <= rows:
            break
    else:
        width, height = max(round(min(columns, rows * aspect)), 1), max(round(min(rows, columns / aspect)), 1)
    left, top = crop_offset(columns - width, view.crop_x), crop_offset(rows - height, view.crop_y)
    return Box(left, top, left + width, top + height)


def _covering_size(shape: Size, size: Size, resize: Resize) -> tuple[float, float]:
    """Return the smallest (H, W) that covers `size`; fractional, except for cv2."""
    scale = max(size[0] / shape[0], size[1] / shape[1])
    height, width = shape[0] * scale, shape[1] * scale
    return (height, width) if resize == "antialias" else (max(round(height), size[0]), max(round(width), size[1]))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def _full_resize_is_faster(shape: Size, size: Size) -> bool:
    height, width = _covering_size(shape, size, "antialias")
    return height * width <= MAX_OVERSIZE * size[0] * size[1]


def _resize_then_crop(pixels: Tensor, size: Size, view: ViewParams, extent: DecodedExtent | None = None) -> Tensor:
    """Resize the full image, six times as fast as Pillow with AVX2, then crop it."""
    # Each pass rounds, so the result is within two of 255 levels of Pillow's when Pillow resizes along rows first.
    extent = extent or DecodedExtent((pixels.shape[1], pixels.shape[2]))
    (height, width), shape = size, extent.shape
    scaled_height, scaled_width = _covering_size(shape, size, "antialias")
    factor = max(height / shape[0], width / shape[1]) * extent.factor
    # interpolate rounds sizes down: slightly more than `factor` keeps the last row and column.
    resized = pixels if factor == 1 else _bicubic_by_factor(factor * (1 + 1e-9), pixels)
    top, left = crop_offset(scaled_height - height, view.crop_y), crop_offset(scaled_width - width, view.crop_x)
    return resized[:, top : top + height, left : left + width]


def _bicubic_by_factor(factor: float, pixels: Tensor) -> Tensor:
    return F.interpolate(pixels[None], scale_factor=(factor, factor), mode="bicubic", antialias=True)[0]


def _bicubic(pixels: Tensor, size: Size) -> Tensor:
    return F.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]


def _cv2_resize_then_crop(pixels: Tensor, size: Size, view: ViewParams) -> Tensor:
    (height, width), shape = size, (pixels.shape[1], pixels.shape[2])
    scaled_height, scaled_width = (int(side) for side in _covering_size(shape, size, "cv2"))
    top, left = crop_offset(scaled_height - height, view.crop_y), crop_offset(scaled_width - width, view.crop_x)
    scaled_size = (scaled_height, scaled_width)
    return _cv2_bilinear(pixels, scaled_size, slice(top, top + height), slice(left, left + width))


def _cv2_bilinear(pixels: Tensor, size: Size, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
    height, width = pixels.shape[1:]
    upper, lower = _neighbor_weights(height, size[0], rows)
    left, right = _neighbor_weights(width, size[1], columns)
    above, below = (_blend_columns(pixels[:, index], left, right) >> 4 for index, _ in (upper, lower))
    # OpenCV's rounding: 4 bits are dropped before the second pass, 16 of each product; the last 2 round to nearest.
    total = (above * upper[1][:, None] >> 16) + (below * lower[1][:, None] >> 16)
    return (total + 2 >> 2).clamp(0, 255).byte()


def _blend_columns(pixels: Tensor, left: WeightedIndices, right: WeightedIndices) -> Tensor:
    return pixels[..., left[0]].int() * left[1] + pixels[..., right[0]].int() * right[1]


def _neighbor_weights(length: int, result: int, part: slice) -> tuple[WeightedIndices, WeightedIndices]:
    positions = ((torch.arange(result, dtype=torch.float64)[part] + 0.5) * (length / result) - 0.5).float()
    first = positions.floor()
    fraction = positions - first
    weights = ((1 - fraction) * 2**CV2_WEIGHT_BITS).round().int(), (fraction * 2**CV2_WEIGHT_BITS).round().int()
    indices = (first.long() + offset for offset in (0, 1))
    near, far = ((index.clamp(0, length - 1), weight) for index, weight in zip(indices, weights, strict=True))
    return near, far
