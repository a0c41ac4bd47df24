"""The earth from above, with a map of its heights and waters: pairs to train "map to image" on, nothing to download.

Three aligned maps of 2048 x 1024 pixels that ship with vqf (assets/earth/NOTICE). They are equirectangular: a pixel is
0.176 degrees in both directions, wherever it lies. It is one image of one planet: results say nothing about others.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.batch import Sample, Size, pair
from vqf.data.images.decode import open_image
from vqf.data.images.maps import MapDecoder
from vqf.errors import UserError, unknown_message
from vqf.registry import register
from vqf.seeding import seeded_generator

ASSETS = Path(__file__).parent / "assets" / "earth"
FILES = ("earth-2048.jpg", "elevation-2048.png", "water-2048.png")
HEIGHT, WIDTH = 1024, 2048
FIRST_ROW = math.ceil((90 - 75) / 180 * HEIGHT)  # the first row south of 75 N
LAST_ROW = math.floor((90 + 60) / 180 * HEIGHT)  # the last row north of 60 S ends here
WATER_COLOR = (0, 0, 255)  # water on a map, in RGB: this very colour, so that anybody can draw with it
ELEVATION_EXPONENT = (
    0.5  # half of all land is in the lowest 6 % of the heights; their square root spreads it over the greys
)
LAND_ATTEMPTS = 64  # places that are drawn for a crop that is to lie on land, of which every third does


class Window(NamedTuple):
    """A crop, in pixels of the whole map; what lies right of the last column is at the left again."""

    top: int
    left: int
    height: int
    width: int


@register("data", "earth")
class Earth:
    """Crops of a satellite image of the earth, each with the map that one would draw of it.

    `Sample.condition` (3, H, W) is that map: water blue (`WATER_COLOR`), land grey, black at sea level and white on the
    highest mountains, brightness being the square root of the height. `Sample.crop_box` is where the crop lies, from
    75 N (0) to 60 S (1); its right side is above 1 where it crosses 180 E, and left and right change places where it is
    mirrored.

    A band of longitude is for validation: no training crop reaches into it, and no validation crop out of it. What is
    south of 60 S or north of 75 N is left out. Validation is a grid of crops that overlap by half.

    Args:
        crops: Training crops per epoch, drawn anew in each.
        zoom: Pixels of the result per pixel of the map: 0.5 shows an area twice as wide and high.
        scale: Training crops show an area up to so many times as wide and high, or as narrow and low.
        land: Share of the training crops that have land at their centre; the others lie anywhere, mostly at sea.
        flip: Mirror every other training crop from left to right.
        band: The meridians between which validation lies, in degrees east.
    """

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        crops: int = 4096,
        zoom: float = 1.0,
        scale: float = 1.0,
        land: float = 0.5,
        flip: bool = True,
        band: Sequence[float] = (60.0, 100.0),
    ) -> None:
        if crops < 1:
            raise ValueError(f"crops={crops} is not positive")
        if zoom <= 0:
            raise ValueError(f"zoom={zoom:g} is not positive")
        if scale < 1:
            raise ValueError(f"scale={scale:g} is below 1; 1.25 shows areas from 0.8 to 1.25 times as wide")
        if not 0 <= land <= 1:
            raise ValueError(f"land={land:g} is not in [0, 1]")
        self.size, self.seed = pair(image_size), seed
        self.crops, self.zoom, self.scale, self.land, self.flip = crops, zoom, scale, land, flip
        self.band_start, self.band_stop = _band_columns(band)
        self.classes: list[str] = []
        _check_fits("the validation band", self.crop_extent(), self.band_stop - self.band_start)
        _check_fits("the rest of the earth", self.crop_extent(scale), self.band_start + WIDTH - self.band_stop)

    @staticmethod
    def condition_reader() -> MapDecoder:
        """Return what reads a drawn map: its colours as they are."""
        return MapDecoder("palette")

    def split(self, name: str) -> "EarthSplit":
        """Return "train" or "validation"."""
        if name not in ("train", "validation"):
            raise UserError(unknown_message("split", name, ("train", "validation")))
        return EarthSplit(self, name == "train")

    def crop_extent(self, factor: float = 1.0) -> Size:
        """Return how many rows and columns of the map a crop shows, that many times as large as usual."""
        height, width = self.size
        return max(round(height / self.zoom * factor), 1), max(round(width / self.zoom * factor), 1)


class EarthSplit:
    """The part of the earth that is for training, or for validation."""

    def __init__(self, data: Earth, training: bool) -> None:
        self.data, self.training = data, training
        self.grid = _validation_windows(data.crop_extent(), data.band_start, data.band_stop)
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return self.data.crops if self.training else len(self.grid)

    def item(self, epoch: int, index: int) -> Sample:
        """Return a crop and its map; validation crops are the same in every epoch."""
        if not self.training:
            return render_crop(self.grid[index], self.data.size)
        random = seeded_generator(self.data.seed, epoch, index)
        stretch, mirror, inland = torch.rand(3, generator=random).tolist()
        extent = self.data.crop_extent(self.data.scale ** (2 * stretch - 1))
        window = self._random_window(extent, inland < self.data.land, random)
        return render_crop(window, self.data.size, mirrored=self.data.flip and mirror < 0.5)

    def _random_window(self, extent: Size, inland: bool, random: torch.Generator) -> Window:
        height, width = extent
        tops = torch.randint(FIRST_ROW, LAST_ROW - height + 1, (LAND_ATTEMPTS,), generator=random)
        lefts = torch.randint(
            self.data.band_stop, self.data.band_start + WIDTH - width + 1, (LAND_ATTEMPTS,), generator=random
        )
        centres = world_maps()[-1, tops + height // 2, (lefts + width // 2) % WIDTH]
        pick = int((centres < 128).int().argmax()) if inland else 0  # the first on land
        return Window(int(tops[pick]), int(lefts[pick]), height, width)

    def _fingerprint(self) -> str:
        data = self.data
        facts: list[object] = [data.size, data.zoom, data.band_start, data.band_stop, self.training]
        if self.training:
            facts += [data.seed, data.crops, data.scale, data.land, data.flip]
        digest = hashlib.sha256(repr(facts).encode())
        for name in FILES:
            digest.update((ASSETS / name).read_bytes())
        return digest.hexdigest()


def render_crop(window: Window, size: Size, mirrored: bool = False) -> Sample:
    """Show a part of the earth at a size, with its map."""
    columns = torch.arange(window.left, window.left + window.width) % WIDTH
    pixels = world_maps()[:, window.top : window.top + window.height, columns].float() / 255
    if pixels.shape[1:] != size:
        pixels = F.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, bottom = ((row - FIRST_ROW) / (LAST_ROW - FIRST_ROW) for row in (window.top, window.top + window.height))
    left = window.left % WIDTH / WIDTH
    sides = [left, left + window.width / WIDTH]
    if mirrored:
        pixels, sides = pixels.flip(-1), sides[::-1]
    place = torch.tensor([top, sides[0], bottom, sides[1]])
    return Sample(pixels[:3] * 2 - 1, condition=render_map(pixels[3], pixels[4]), crop_box=place)


def render_map(elevation: Tensor, water: Tensor) -> Tensor:
    """Draw the map of a region from its heights and its share of water, each (H, W) in [0, 1]. -> (3, H, W)."""
    blue = torch.tensor(WATER_COLOR).view(3, 1, 1) / 255
    return torch.where(water < 128 / 255, elevation**ELEVATION_EXPONENT, blue) * 2 - 1


@lru_cache(maxsize=1)
def world_maps() -> Tensor:
    """Return red, green, blue, elevation and water of every place, uint8 (5, 1024, 2048).

    Decoded once per process; worker processes that are forked afterwards share it.
    """
    pixels = [torch.from_numpy(np.array(open_image(ASSETS / name))).view(HEIGHT, WIDTH, -1) for name in FILES]
    return torch.cat(pixels, dim=2).permute(2, 0, 1).contiguous()


def _band_columns(band: Sequence[float]) -> tuple[int, int]:
    """Return the first column of a band of longitude, and the one after its last."""
    if len(band) != 2 or not 0 < band[1] - band[0] < 360:
        raise ValueError(f"band={list(band)} is not two meridians, the western one first, as in [60,100] or [170,190]")
    return tuple(round((east + 180) / 360 * WIDTH) for east in band)  # type: ignore[return-value]


def _check_fits(what: str, extent: Size, columns: int) -> None:
    if extent[0] > LAST_ROW - FIRST_ROW or extent[1] > columns:
        raise ValueError(
            f"a crop shows {extent[0]} x {extent[1]} pixels of the map, more than the "
            f"{LAST_ROW - FIRST_ROW} x {columns} of {what}; take a smaller image_size, "
            "a larger data.zoom, or another data.band"
        )


def _validation_windows(extent: Size, start: int, stop: int) -> list[Window]:
    height, width = extent
    rows, columns = (
        _overlapping_starts(FIRST_ROW, LAST_ROW - height, height),
        _overlapping_starts(start, stop - width, width),
    )
    return [Window(top, left, height, width) for top in rows for left in columns]


def _overlapping_starts(first: int, last: int, length: int) -> list[int]:
    """Place the fewest pieces evenly from `first` to `last` that overlap by half of their length or more."""
    steps = math.ceil((last - first) / max(length / 2, 1))
    return [first + round((last - first) * i / max(steps, 1)) for i in range(steps + 1)]
