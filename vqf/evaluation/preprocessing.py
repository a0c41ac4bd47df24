"""Images as a protocol wants them: brought to their size in a way that is written down, and rounded to 8 bits."""

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
from vqf.protocols import Split

FILTERS = {each.name.lower(): each for each in Image.Resampling}


def crop_split(split: Split, size: Size, crop: str, resize: str) -> Split:
    """Return a split whose images come to their size as a protocol says, without any variation.

    Raises:
        UserError: If its images are no files that could be had whole.
    """
    if crop == "source":
        return split
    if not isinstance(split, ImageFileSplit):
        raise UserError(f"protocol.crop={crop}: this data keeps no files that could be cropped; take crop=source")
    return CroppedSplit(
        split, size, adm_center_crop if crop == "adm" else lambda image, size: center_crop(image, size, resize)
    )


class CroppedSplit:
    """The whole images of a split, each cropped by a function."""

    def __init__(self, files: ImageFileSplit, size: Size, crop: Callable[[Image.Image, Size], Image.Image]) -> None:
        self.files, self.size, self.crop = files, size, crop
        self.labels = getattr(files, "labels", None)
        self.fingerprint = cast(Split, files).fingerprint

    def __len__(self) -> int:
        return len(self.files.names)

    def item(self, epoch: int, index: int) -> Sample:
        """Return an image; the same in every epoch.

        Raises:
            UserError: If it cannot be read: an evaluation replaces nothing.
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
    """Scale an RGB image until it just covers `size`, then cut off both ends of the longer side.

    To the pixel what Resize and CenterCrop of torchvision do, whose larger side is cut to a whole number.
    """
    height, width = size
    # Products before quotients, or a whole number might come out as a little less.
    whole = max(height * image.width // image.height, width), max(width * image.height // image.width, height)
    scaled = _resize_linear(image, whole) if resize == "linear" else image.resize(whole, FILTERS[resize])
    left, top = round((whole[0] - width) / 2), round((whole[1] - height) / 2)
    return scaled.crop((left, top, left + width, top + height))


def adm_center_crop(image: Image.Image, size: Size) -> Image.Image:
    """Halve an RGB image with a box filter as often as it stays twice as large; then scale with a cubic, and cut.

    To the pixel what center_crop_arr of guided-diffusion does, whose larger side is rounded.
    """
    height, width = size
    while min(image.width / width, image.height / height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    whole = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    return image.resize(whole, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))


def _resize_linear(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Interpolate between the four nearest pixels, however many lie under one of the result, as cv2 does."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    scaled = F.interpolate(pixels, size=(size[1], size[0]), mode="bilinear", align_corners=False)
    return Image.fromarray(scaled[0].round().to(torch.uint8).permute(1, 2, 0).numpy())


def round_to_8bit(images: Tensor, rounding: str) -> Tensor:
    """Return images in [-1, 1] as their 8-bit pixels show them, in [-1, 1] again; with "none", only clamped."""
    images = images.float().clamp(-1, 1)
    return images if rounding == "none" else to_uint8(images, rounding).float() / 127.5 - 1


def to_uint8(images: Tensor, rounding: str = "nearest") -> Tensor:
    """Turn images in [-1, 1] into uint8, to the nearest or cut to the next below."""
    levels: Any = (images + 1) * 127.5
    return (levels if rounding == "truncate" else levels.round()).to(torch.uint8)
