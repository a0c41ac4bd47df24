"""Random augmentation that depends on (seed, epoch, index) alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from vqf.options.ranges import NonNegativeFloat, PositiveFloat, PositiveFraction

Crop = Literal["center", "random", "resized"]
Resize = Literal["antialias", "cv2"]
CropArea = tuple[PositiveFraction, PositiveFraction]
CropRatio = tuple[PositiveFloat, PositiveFloat]
Jitter = tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, Annotated[float, Interval(ge=0, le=0.5)]]

CROP_ATTEMPTS = 10  # regions drawn per image; the first that fits into it is used
JITTER_PROPERTIES = ("brightness", "contrast", "saturation", "hue")
DEFAULT_CROP_AREA, DEFAULT_CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of torchvision's RandomResizedCrop
NO_JITTER = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ViewParams:
    """The augmentation of one image.

    The first of `regions` that fits is stretched to the image size; without any, the image is scaled until it covers
    that size. `crop_x` and `crop_y` position the crop.
    """

    crop_x: float | None = None  # in [0, 1], from left to right; None is the center
    crop_y: float | None = None
    regions: tuple[tuple[float, float], ...] = ()  # (area as a fraction of the image's, aspect ratio), see `crop_ratio`
    flipped: bool = False
    color_factors: tuple[tuple[str, float], ...] = ()  # (property, factor), in the order of application

    def apply(self, image: Tensor) -> Tensor:
        """Flip an image (C, H, W) in [-1, 1], and jitter its first three channels."""
        if self.color_factors:
            image = torch.cat([adjust_colors(image[:3], self.color_factors), image[3:]])
        return image.flip(-1) if self.flipped else image

    def flip_box(self, crop_box: Tensor) -> Tensor:
        """Flip a crop box (top, left, bottom, right) with the image."""
        return crop_box[[0, 3, 2, 1]] if self.flipped else crop_box


CENTER_CROP = ViewParams()


@dataclass(frozen=True)
class Augmentation:
    """The distribution of `ViewParams`, with the options of `data=folder`."""

    crop: Crop = "center"
    area: CropArea = DEFAULT_CROP_AREA
    ratio: CropRatio = DEFAULT_CROP_RATIO
    flip: bool = False
    jitter: Jitter = NO_JITTER
    resize: Resize = "antialias"

    def __post_init__(self) -> None:
        if self.area[0] > self.area[1]:
            raise ValueError(f"crop_area={list(self.area)}: give the smaller area first")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"crop_ratio={list(self.ratio)}: give the smaller ratio first")

    @property
    def is_random(self) -> bool:
        return self.crop != "center" or self.flip or any(self.jitter)

    @property
    def fingerprint_fields(self) -> tuple[object, ...]:
        regions = (*self.area, *self.ratio) if self.crop == "resized" else ()
        return self.crop, self.flip, tuple(self.jitter), self.resize, regions

    def deterministic(self) -> "Augmentation":
        return replace(self, crop="center", flip=False, jitter=NO_JITTER)

    def sample(self, random: torch.Generator) -> ViewParams:
        # Always three numbers, so that turning crop or flip off leaves the choices of the other as they were.
        crop_x, crop_y, mirror = torch.rand(3, generator=random).tolist()
        view = ViewParams() if self.crop == "center" else ViewParams(crop_x, crop_y)
        regions = self._regions(random) if self.crop == "resized" else ()
        colors = self._colors(random) if any(self.jitter) else ()
        return replace(view, regions=regions, flipped=self.flip and mirror < 0.5, color_factors=colors)

    def _regions(self, random: torch.Generator) -> tuple[tuple[float, float], ...]:
        """Draw regions like torchvision's RandomResizedCrop."""
        uniform = torch.rand(CROP_ATTEMPTS, 2, generator=random, dtype=torch.float64)
        areas = self.area[0] + uniform[:, 0] * (self.area[1] - self.area[0])
        low, high = (math.log(bound) for bound in self.ratio)
        ratios = (low + uniform[:, 1] * (high - low)).exp()
        return tuple(zip(areas.tolist(), ratios.tolist(), strict=True))

    def _colors(self, random: torch.Generator) -> tuple[tuple[str, float], ...]:
        signed = (torch.rand(4, generator=random, dtype=torch.float64) * 2 - 1).tolist()
        order = torch.randperm(4, generator=random).tolist()
        factors = [(JITTER_PROPERTIES[i], self._factor(i, signed[i])) for i in order]
        return tuple((name, factor) for name, factor in factors if self.jitter[JITTER_PROPERTIES.index(name)])

    def _factor(self, index: int, signed: float) -> float:
        strength = self.jitter[index]
        if JITTER_PROPERTIES[index] == "hue":
            return signed * strength
        low, high = max(1 - strength, 0.0), 1 + strength
        return (low + high) / 2 + signed * (high - low) / 2


def adjust_colors(image: Tensor, color_factors: Sequence[tuple[str, float]]) -> Tensor:
    """Change the colors of an image (3, H, W) in [-1, 1] as torchvision does."""
    from torchvision.transforms.v2 import functional as F

    values = (image + 1) / 2
    for name, factor in color_factors:
        values = getattr(F, f"adjust_{name}")(values, factor)
    return values * 2 - 1
