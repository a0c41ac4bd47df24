"""Preprocessing by a protocol: cropping and rounding to 8 bits."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vqf.batch import Sample, Size
from vqf.dataloading.image_files import ImageFileSplit
from vqf.errors import UserError
from vqf.protocols import Labelled, Split

FILTERS = {each.name.lower(): each for each in Image.Resampling}


def crop_split(split: Split, size: Size, crop: str, resize: str) -> Split:
    """Return a split cropped as a protocol says.

    Raises:
        UserError: If it does not read files.
    """
    if crop == "source":
        return split
    if not isinstance(split, ImageFileSplit):
        raise UserError(f"protocol.crop={crop}: this data source has no image files to crop; use protocol.crop=source")
    return CroppedSplit(
        split, size, adm_center_crop if crop == "adm" else lambda image, size: center_crop(image, size, resize)
    )


class CroppedSplit:
    """The image files of a split, cropped."""

    def __init__(self, files: ImageFileSplit, size: Size, crop: Callable[[Image.Image, Size], Image.Image]) -> None:
        self.files, self.size, self.crop = files, size, crop
        self.labels = files.labels if isinstance(files, Labelled) else None
        self.fingerprint = cast(Split, files).fingerprint

    def __len__(self) -> int:
        return len(self.files.names)

    def item(self, epoch: int, index: int) -> Sample:
        """Return an image.

        Raises:
            UserError: If it cannot be read.
        """
        try:
            pixels = np.array(self.crop(self.files.file(index).load_image(), self.size), dtype=np.uint8)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"cannot evaluate on '{self.files.names[index]}' ({error}); repair or remove it") from error
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
        return Sample(image, None if self.labels is None else int(self.labels[index]))


def center_crop(image: Image.Image, size: Size, resize: str) -> Image.Image:
    """Resize an image to just cover `size`, then crop the center, as torchvision does."""
    height, width = size
    # In integers: in floats, a side that is exact could round down to one less.
    resized = max(height * image.width // image.height, width), max(width * image.height // image.width, height)
    scaled = _resize_linear(image, resized) if resize == "linear" else image.resize(resized, FILTERS[resize])
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    return scaled.crop((left, top, left + width, top + height))


def adm_center_crop(image: Image.Image, size: Size) -> Image.Image:
    """Halve an image while it is at least twice `size`, then resize and crop, as guided-diffusion's center_crop_arr."""
    height, width = size
    while min(image.width / width, image.height / height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    resized = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    return image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))


def _resize_linear(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Interpolate without antialiasing, as cv2 does."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    scaled = F.interpolate(pixels, size=(size[1], size[0]), mode="bilinear", align_corners=False)
    return Image.fromarray(scaled[0].round().to(torch.uint8).permute(1, 2, 0).numpy())


def round_to_8bit(images: Tensor, rounding: str) -> Tensor:
    """Quantize images in [-1, 1] to 8 bits; with "none", only clamp."""
    images = images.float().clamp(-1, 1)
    return images if rounding == "none" else to_uint8(images, rounding).float() / 127.5 - 1


def to_uint8(images: Tensor, rounding: str = "nearest") -> Tensor:
    """Convert images in [-1, 1] to uint8, rounding to the nearest or down."""
    levels: Any = (images + 1) * 127.5
    return (levels if rounding == "truncate" else levels.round()).to(torch.uint8)
