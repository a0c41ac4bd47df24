"""Crops of three aligned equirectangular maps of 2048 x 1024 pixels, 0.176 degrees each (assets/earth/NOTICE)."""

import hashlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from vqf.batch import Sample, Size, pair
from vqf.data.images.decode import open_image
from vqf.data.images.maps import MapDecoder
from vqf.errors import UserError, unknown_message
from vqf.options.ranges import Fraction, Number, PositiveInt
from vqf.registry import register
from vqf.seeding import seeded_generator

ASSETS = Path(__file__).parent / "assets" / "earth"
FILES = ("earth-2048.jpg", "elevation-2048.png", "water-2048.png")
HEIGHT, WIDTH = 1024, 2048
FIRST_ROW = math.ceil((90 - 75) / 180 * HEIGHT)  # the first row south of 75 N
LAST_ROW = math.floor((90 + 60) / 180 * HEIGHT)  # end of the rows north of 60 S, exclusive
WATER_COLOR = (0, 0, 255)  # water on a map, RGB: one exact color, so that users can draw it
ELEVATION_EXPONENT = 0.5  # half of all land is in the lowest 6 % of elevations; the root spreads it over the grays
LAND_ATTEMPTS = 64  # positions drawn for a crop on land; about a third of them are


class MapCrop(NamedTuple):
    """A crop in pixels of the map; columns wrap around at 180 E."""

    top: int
    left: int
    height: int
    width: int


@register("data", "earth")
class Earth:
    """Crops of a satellite image of the earth, each with a condition map of elevation and water.

    `Sample.condition` (3, H, W) shows water in `WATER_COLOR` and land in gray: the square root of the elevation, black
    at sea level. `Sample.crop_box` is the crop's position from 75 N (0) to 60 S (1) and from 180 W (0) to 180 E (1).
    Its right side is above 1 where the crop crosses 180 E; left and right are swapped where it is mirrored.

    No crop crosses the edges of the validation band. Validation is a grid of crops that overlap by half.

    Args:
        crops: Number of random training crops per epoch.
        zoom: Pixels of the result per pixel of the map: 0.5 shows an area twice as wide and high.
        scale: Largest factor by which the width and height of a training crop's area vary: 1.25 is from
            0.8 to 1.25 times.
        land: Fraction of training crops with land at their center; the others are anywhere.
        flip: Mirror each training crop with probability 1/2.
        band: The meridians between which validation lies, in degrees east, the western one first.
    """

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        crops: PositiveInt = 4096,
        zoom: Annotated[float, Interval(ge=0.01, le=100)] = 1.0,
        scale: Annotated[float, Interval(ge=1, le=100)] = 1.0,
        land: Fraction = 0.5,
        flip: bool = True,
        band: tuple[Number, Number] = (60.0, 100.0),
    ) -> None:
        self.size, self.seed = pair(image_size), seed
        self.crops, self.zoom, self.scale, self.land, self.flip = crops, zoom, scale, land, flip
        self.band_start, self.band_stop = _band_columns(band)
        self.classes: list[str] = []
        _check_fits("the validation band", self.crop_extent(), self.band_stop - self.band_start)
        _check_fits("the rest of the earth", self.crop_extent(scale), self.band_start + WIDTH - self.band_stop)

    @staticmethod
    def condition_reader() -> MapDecoder:
        return MapDecoder("palette")

    def split(self, name: str) -> "EarthSplit":
        if name not in ("train", "validation"):
            raise UserError(unknown_message("split", name, ("train", "validation")))
        return EarthSplit(self, name == "train")

    def crop_extent(self, factor: float = 1.0) -> Size:
        """Return rows and columns of the map in a crop, times `factor`."""
        height, width = self.size
        return max(round(height / self.zoom * factor), 1), max(round(width / self.zoom * factor), 1)


class EarthSplit:
    """Training or validation crops."""

    def __init__(self, data: Earth, training: bool) -> None:
        self.data, self.training = data, training
        self.grid = _validation_crops(data.crop_extent(), data.band_start, data.band_stop)
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return self.data.crops if self.training else len(self.grid)

    def item(self, epoch: int, index: int) -> Sample:
        if not self.training:
            return render_crop(self.grid[index], self.data.size)
        random = seeded_generator(self.data.seed, epoch, index)
        stretch, mirror, inland = torch.rand(3, generator=random).tolist()
        extent = self.data.crop_extent(self.data.scale ** (2 * stretch - 1))
        crop = self._random_crop(extent, inland < self.data.land, random)
        return render_crop(crop, self.data.size, mirrored=self.data.flip and mirror < 0.5)

    def _random_crop(self, extent: Size, inland: bool, random: torch.Generator) -> MapCrop:
        height, width = extent
        tops = torch.randint(FIRST_ROW, LAST_ROW - height + 1, (LAND_ATTEMPTS,), generator=random)
        lefts = torch.randint(
            self.data.band_stop, self.data.band_start + WIDTH - width + 1, (LAND_ATTEMPTS,), generator=random
        )
        water = world_maps()[-1, tops + height // 2, (lefts + width // 2) % WIDTH]
        pick = int((water < 128).int().argmax()) if inland else 0  # the first with land at its center
        return MapCrop(int(tops[pick]), int(lefts[pick]), height, width)

    def _fingerprint(self) -> str:
        data = self.data
        fields: list[object] = [data.size, data.zoom, data.band_start, data.band_stop, self.training]
        if self.training:
            fields += [data.seed, data.crops, data.scale, data.land, data.flip]
        digest = hashlib.sha256(repr(fields).encode())
        for name in FILES:
            digest.update((ASSETS / name).read_bytes())
        return digest.hexdigest()


def render_crop(crop: MapCrop, size: Size, mirrored: bool = False) -> Sample:
    """Resize a crop to `size` (H, W), and render its condition map."""
    columns = torch.arange(crop.left, crop.left + crop.width) % WIDTH
    pixels = world_maps()[:, crop.top : crop.top + crop.height, columns].float() / 255
    if pixels.shape[1:] != size:
        pixels = F.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, bottom = ((row - FIRST_ROW) / (LAST_ROW - FIRST_ROW) for row in (crop.top, crop.top + crop.height))
    left = crop.left % WIDTH / WIDTH
    sides = [left, left + crop.width / WIDTH]
    if mirrored:
        pixels, sides = pixels.flip(-1), sides[::-1]
    crop_box = torch.tensor([top, sides[0], bottom, sides[1]])
    return Sample(pixels[:3] * 2 - 1, condition=render_map(pixels[3], pixels[4]), crop_box=crop_box)


def render_map(elevation: Tensor, water: Tensor) -> Tensor:
    """Render elevation and water, each (H, W) in [0, 1]. -> (3, H, W) in [-1, 1]."""
    blue = torch.tensor(WATER_COLOR).view(3, 1, 1) / 255
    return torch.where(water < 128 / 255, elevation**ELEVATION_EXPONENT, blue) * 2 - 1


@lru_cache(maxsize=1)
def world_maps() -> Tensor:
    """Return red, green, blue, elevation and water, uint8 (5, 1024, 2048)."""
    pixels = [torch.from_numpy(np.array(open_image(ASSETS / name))).view(HEIGHT, WIDTH, -1) for name in FILES]
    return torch.cat(pixels, dim=2).permute(2, 0, 1).contiguous()


def _band_columns(band: tuple[float, float]) -> tuple[int, int]:
    if not 0 < band[1] - band[0] < 360:
        raise ValueError(f"band={list(band)} is not two meridians, the western one first, as in [60,100] or [170,190]")
    start, stop = (round((east + 180) / 360 * WIDTH) for east in band)
    return start, stop


def _check_fits(what: str, extent: Size, columns: int) -> None:
    if extent[0] > LAST_ROW - FIRST_ROW or extent[1] > columns:
        raise ValueError(
            f"a crop shows {extent[0]} x {extent[1]} pixels of the map, more than the "
            f"{LAST_ROW - FIRST_ROW} x {columns} of {what}; take a smaller image_size, "
            "a larger data.zoom, or another data.band"
        )


def _validation_crops(extent: Size, start: int, stop: int) -> list[MapCrop]:
    height, width = extent
    rows, columns = (
        _overlapping_starts(FIRST_ROW, LAST_ROW - height, height),
        _overlapping_starts(start, stop - width, width),
    )
    return [MapCrop(top, left, height, width) for top in rows for left in columns]


def _overlapping_starts(first: int, last: int, length: int) -> list[int]:
    steps = math.ceil((last - first) / max(length / 2, 1))
    return [first + round((last - first) * i / max(steps, 1)) for i in range(steps + 1)]
