"""How images vary in training: which part is shown, whether it is mirrored, how its colours change.

Everything random is drawn here, from a generator that depends on (seed, epoch, index); the rest is arithmetic, so that
no number of worker processes changes what is seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Crop = Literal["center", "random", "resized"]
Resize = Literal["antialias", "cv2"]

CROP_ATTEMPTS = 10  # regions that are drawn for an image, of which the first that fits into it is shown
JITTER_PROPERTIES = ("brightness", "contrast", "saturation", "hue")
DEFAULT_CROP_AREA, DEFAULT_CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of torchvision's RandomResizedCrop
NO_JITTER = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ViewParams:
    """How one image is shown.

    Without `regions` it is scaled until it covers the size that is wanted, and what is too much is cut off. With them,
    the first that fits is cut out and stretched to that size; `crop_x` and `crop_y` say where it lies.
    """

    crop_x: float | None = None  # in [0, 1], from left to right; None is the middle
    crop_y: float | None = None
    regions: tuple[tuple[float, float], ...] = ()  # share of the image's area; width to height, 1 being that wanted
    flipped: bool = False
    color_factors: tuple[tuple[str, float], ...] = ()  # what is changed, one after the other, by which factor

    def apply(self, image: Tensor) -> Tensor:
        """Mirror an image (C, H, W) in [-1, 1], and change the colours of the first three channels."""
        if self.color_factors:
            image = torch.cat([adjust_colors(image[:3], self.color_factors), image[3:]])
        return image.flip(-1) if self.flipped else image

    def flip_box(self, place: Tensor) -> Tensor:
        """Return the place (4,) of a finished image: mirrored, its left side is the right one of the whole."""
        return place[[0, 3, 2, 1]] if self.flipped else place


CENTER_CROP = ViewParams()


@dataclass(frozen=True)
class Augmentation:
    """The ways in which a source shows its images; the words are those of `data=folder`."""

    crop: Crop = "center"
    area: Sequence[float] = DEFAULT_CROP_AREA
    ratio: Sequence[float] = DEFAULT_CROP_RATIO
    flip: bool = False
    jitter: Sequence[float] = NO_JITTER
    resize: Resize = "antialias"

    def __post_init__(self) -> None:
        if len(self.area) != 2 or not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"crop_area={list(self.area)} is not two shares of an image, the smaller one first")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crop_ratio={list(self.ratio)} is not two positive numbers, the smaller one first")
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            what = f"{', '.join(JITTER_PROPERTIES)}, the last at most 0.5"
            raise ValueError(f"jitter={list(self.jitter)} is not four numbers from 0 on: {what}")

    @property
    def is_random(self) -> bool:
        """Whether an image looks different in another epoch."""
        return self.crop != "center" or self.flip or any(self.jitter)

    @property
    def fingerprint_fields(self) -> tuple[object, ...]:
        """What decides how images look, for fingerprints."""
        regions = (*self.area, *self.ratio) if self.crop == "resized" else ()
        return self.crop, self.flip, tuple(self.jitter), self.resize, regions

    def deterministic(self) -> "Augmentation":
        """Return the way in which images are shown for validation."""
        return replace(self, crop="center", flip=False, jitter=NO_JITTER)

    def sample(self, random: torch.Generator) -> ViewParams:
        """Draw how one image is shown."""
        across, down, mirror = torch.rand(3, generator=random).tolist()
        placed = ViewParams() if self.crop == "center" else ViewParams(across, down)
        regions = self._regions(random) if self.crop == "resized" else ()
        colors = self._colors(random) if any(self.jitter) else ()
        return replace(placed, regions=regions, flipped=self.flip and mirror < 0.5, color_factors=colors)

    def _regions(self, random: torch.Generator) -> tuple[tuple[float, float], ...]:
        shares = torch.rand(CROP_ATTEMPTS, 2, generator=random, dtype=torch.float64)
        areas = self.area[0] + shares[:, 0] * (self.area[1] - self.area[0])
        low, high = (math.log(each) for each in self.ratio)
        ratios = (low + shares[:, 1] * (high - low)).exp()
        return tuple(zip(areas.tolist(), ratios.tolist(), strict=True))

    def _colors(self, random: torch.Generator) -> tuple[tuple[str, float], ...]:
        """Draw a factor each, and the order in which they are applied, as torchvision's ColorJitter does."""
        signed = (torch.rand(4, generator=random, dtype=torch.float64) * 2 - 1).tolist()
        order = torch.randperm(4, generator=random).tolist()
        changes = [(JITTER_PROPERTIES[i], self._factor(i, signed[i])) for i in order]
        return tuple((name, factor) for name, factor in changes if self.jitter[JITTER_PROPERTIES.index(name)])

    def _factor(self, which: int, signed: float) -> float:
        most = self.jitter[which]
        if JITTER_PROPERTIES[which] == "hue":
            return signed * most
        low, high = max(1 - most, 0.0), 1 + most
        return (low + high) / 2 + signed * (high - low) / 2


def adjust_colors(image: Tensor, color_factors: Sequence[tuple[str, float]]) -> Tensor:
    """Change the colours of an image (3, H, W) in [-1, 1]: see torchvision's `adjust_brightness` and so on."""
    from torchvision.transforms.v2 import functional as F

    values = (image + 1) / 2
    for name, factor in color_factors:
        values = getattr(F, f"adjust_{name}")(values, factor)
    return values * 2 - 1
