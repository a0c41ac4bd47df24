"""Images at the size that is wanted: which part of them, and how their pixels become fewer or more.

All of it is exact to the bit, whatever the machine: integer arithmetic over weights that are rounded first.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vqf.batch import Size
from vqf.data.images.augment import CENTER_CROP, Resize, ViewParams

MAX_OVERSIZE = 2.0  # how much larger a scaled image may be than the part of it that stays
CV2_WEIGHT_BITS = 11  # of the weights of cv2

WeightedIndices = tuple[Tensor, Tensor]  # which pixels, and how much each counts, in units of 2**-BITS


class Box(NamedTuple):
    """A part of an image, in its pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def scale_by(self, down: float, across: float) -> "Box":
        """Return the same part of an image that is so many times as high and wide."""
        return Box(self.left * across, self.top * down, self.right * across, self.bottom * down)

    def normalized(self, shape: Size) -> Tensor:
        """Return top, left, bottom, right (4,) as shares of the image's height and width."""
        rows, columns = shape
        return torch.tensor([self.top / rows, self.left / columns, self.bottom / rows, self.right / columns])


class DecodedExtent(NamedTuple):
    """How an image lies in the pixels that were decoded of it: of a JPEG, perhaps, at a fraction of its size.

    What is left over of a side that the factor does not divide is a pixel by itself, which the image fills in part:
    1025 pixels at a half are 513, and the image ends in the middle of the last, or begins in the middle of the first.
    """

    shape: Size  # rows and columns of the image as it is stored
    factor: int = 1  # pixels of it, across and down, that became one
    top: float = 0.0  # where it begins
    left: float = 0.0

    def to_decoded(self, box: Box) -> Box:
        """Return where a part of the image lies in what was decoded."""
        small = box.scale_by(1 / self.factor, 1 / self.factor)
        return Box(small.left + self.left, small.top + self.top, small.right + self.left, small.bottom + self.top)


def compute_crop_box(shape: Size, size: Size, view: ViewParams = CENTER_CROP, resize: Resize = "antialias") -> Box:
    """Return the part of an image, of so many rows and columns, that a view shows at some height and width.

    Where the image is scaled until it covers the size, the cut falls between pixels of the result: what needs no
    scaling is cut without any loss. A region is whole pixels of the image.
    """
    if view.regions:
        return _resized_crop_box(shape, size, view)
    (rows, columns), (height, width) = shape, size
    tall, wide = _covering_size(shape, size, resize)
    top, left = crop_offset(tall - height, view.crop_y), crop_offset(wide - width, view.crop_x)
    across, down = columns / wide, rows / tall
    return Box(left * across, top * down, min((left + width) * across, columns), min((top + height) * down, rows))


def crop_and_resize(
    image: Image.Image,
    size: Size,
    view: ViewParams = CENTER_CROP,
    resize: Resize = "antialias",
    extent: DecodedExtent | None = None,
) -> Tensor:
    """Return what a view shows of an RGB image, uint8 (3, H, W). See `compute_crop_box`.

    "antialias" is the antialiased bicubic of Pillow, to within two levels: its two passes round in another place. "cv2"
    is the bilinear of OpenCV, bit for bit: no antialiasing, so fine detail turns into noise, as it does in
    taming-transformers.
    """
    extent = extent or DecodedExtent((image.height, image.width))
    box = compute_crop_box(extent.shape, size, view, resize)
    if view.regions and extent.factor == 1:
        part = _pixels(image.crop(box))
        return _cv2_bilinear(part, size) if resize == "cv2" else _bicubic(part, size)
    if resize == "cv2":
        return _cv2_resize_then_crop(_pixels(image), size, view)
    if not view.regions and extent.top == extent.left == 0 and _full_resize_is_faster(extent.shape, size):
        return _resize_then_crop(_pixels(image), size, view, extent)
    return _pixels(resize_box(image, size, extent.to_decoded(box)))


def resize_box(
    image: Image.Image, size: Size, box: Box, filter: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Scale a part of an image of any mode by Pillow, with antialiasing unless the filter is NEAREST.

    Only the part is computed, so that no shape, however long, takes more memory than the result.
    """
    return image.resize(size[::-1], filter, box=box)


def crop_offset(room: float, place: float | None) -> int:
    """Pick one of the whole numbers from 0 to `room`, `normalized` in [0, 1]; None is the middle, the lower of two."""
    steps = int(room + 1e-6)
    return steps // 2 if place is None else min(int(place * (steps + 1)), steps)


def _resized_crop_box(shape: Size, size: Size, view: ViewParams) -> Box:
    """Return the first region that fits, in whole pixels; if none does, all that has the ratio that is wanted."""
    rows, columns = shape
    wanted = size[1] / size[0]
    for area, ratio in view.regions:
        width = round(math.sqrt(rows * columns * area * ratio * wanted))
        height = round(math.sqrt(rows * columns * area / (ratio * wanted)))
        if 0 < width <= columns and 0 < height <= rows:
            break
    else:
        width, height = max(round(min(columns, rows * wanted)), 1), max(round(min(rows, columns / wanted)), 1)
    left, top = crop_offset(columns - width, view.crop_x), crop_offset(rows - height, view.crop_y)
    return Box(left, top, left + width, top + height)


def _covering_size(shape: Size, size: Size, resize: Resize) -> tuple[float, float]:
    """Return the height and width of an image that just covers a size; cv2 scales to whole numbers."""
    scale = max(size[0] / shape[0], size[1] / shape[1])
    tall, wide = shape[0] * scale, shape[1] * scale
    return (tall, wide) if resize == "antialias" else (max(round(tall), size[0]), max(round(wide), size[1]))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def _full_resize_is_faster(shape: Size, size: Size) -> bool:
    """Say whether `_resize_then_crop` pays, which also computes what is then cut off."""
    tall, wide = _covering_size(shape, size, "antialias")
    return tall * wide <= MAX_OVERSIZE * size[0] * size[1]


def _resize_then_crop(pixels: Tensor, size: Size, view: ViewParams, extent: DecodedExtent | None = None) -> Tensor:
    """Scale the whole image and cut where `compute_crop_box` does; six times as fast as Pillow with AVX2.

    Within two levels of Pillow scaling the whole image first across, then down: each of the passes rounds.
    Pillow by itself takes them in the order that costs less; where a cubic overshoots, that is some levels away.
    """
    extent = extent or DecodedExtent((pixels.shape[1], pixels.shape[2]))
    (height, width), shape = size, extent.shape
    tall, wide = _covering_size(shape, size, "antialias")
    factor = max(height / shape[0], width / shape[1]) * extent.factor
    whole = (
        pixels if factor == 1 else _bicubic_by_factor(factor * (1 + 1e-9), pixels)
    )  # or rounding might take the last row
    top, left = crop_offset(tall - height, view.crop_y), crop_offset(wide - width, view.crop_x)
    return whole[:, top : top + height, left : left + width]


def _bicubic_by_factor(factor: float, pixels: Tensor) -> Tensor:
    return F.interpolate(pixels[None], scale_factor=(factor, factor), mode="bicubic", antialias=True)[0]


def _bicubic(pixels: Tensor, size: Size) -> Tensor:
    return F.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]


def _cv2_resize_then_crop(pixels: Tensor, size: Size, view: ViewParams) -> Tensor:
    (height, width), shape = size, (pixels.shape[1], pixels.shape[2])
    tall, wide = (int(each) for each in _covering_size(shape, size, "cv2"))
    top, left = crop_offset(tall - height, view.crop_y), crop_offset(wide - width, view.crop_x)
    return _cv2_bilinear(pixels, (tall, wide), slice(top, top + height), slice(left, left + width))


def _cv2_bilinear(pixels: Tensor, size: Size, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
    """Scale (C, H, W) to a size as `cv2.resize` does with INTER_LINEAR, and return a part of the result."""
    height, width = pixels.shape[1:]
    upper, lower = _neighbour_weights(height, size[0], rows)
    left, right = _neighbour_weights(width, size[1], columns)
    above, below = (_blend_columns(pixels[:, index], left, right) >> 4 for index, _ in (upper, lower))
    # The rounding of cv2: 4 bits are dropped before the second pass, 16 of each product, and the last 2 to the nearest.
    total = (above * upper[1][:, None] >> 16) + (below * lower[1][:, None] >> 16)
    return (total + 2 >> 2).clamp(0, 255).byte()


def _blend_columns(pixels: Tensor, left: WeightedIndices, right: WeightedIndices) -> Tensor:
    return pixels[..., left[0]].int() * left[1] + pixels[..., right[0]].int() * right[1]


def _neighbour_weights(length: int, result: int, part: slice) -> tuple[WeightedIndices, WeightedIndices]:
    """Return the two pixels between which each pixel of a result lies, both the same beyond the border."""
    places = ((torch.arange(result, dtype=torch.float64)[part] + 0.5) * (length / result) - 0.5).float()
    first = places.floor()
    after = places - first
    weights = ((1 - after) * 2**CV2_WEIGHT_BITS).round().int(), (after * 2**CV2_WEIGHT_BITS).round().int()
    indices = (first.long() + offset for offset in (0, 1))
    near, far = ((index.clamp(0, length - 1), weight) for index, weight in zip(indices, weights, strict=True))
    return near, far
