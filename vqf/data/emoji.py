"""Noto Emoji by Google, Apache-2.0 (https://github.com/googlefonts/noto-emoji), 64 x 64 pixels with transparency."""

import csv
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Interval
from einops import rearrange
from torch import Tensor

from vqf.batch import Sample, Size, pair
from vqf.data.images.alpha import composite, contain, premultiply
from vqf.data.images.decode import open_image
from vqf.errors import UserError, unknown_message
from vqf.hashing import sha256_of
from vqf.registry import register
from vqf.seeding import hash_fraction, seeded_generator

Color = tuple[float, float, float]  # red, green and blue in [0, 1]

ASSETS = Path(__file__).parent / "assets" / "emoji"
CELL_SIZE = 64  # pixels of one emoji in the atlas
COLUMNS = 41  # of the atlas
VALIDATION_FRACTION = 0.15
COLORS: dict[str, Color] = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "grey": (0.5, 0.5, 0.5)}


@register("data", "emoji")
class Emoji:
    """1,636 emoji on a plain background, labelled with their category; `Sample.mask` (1, H, W) is opacity in [0, 1].

    About 15 % are for validation; images with equal pixels are in the same split.

    Args:
        background: Color of transparent pixels. "random" draws a color per training image and epoch, and is white in
            validation.
        flip: Mirror each training image with probability 1/2.
        shift: Move training images by up to this many pixels in each direction.
    """

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        background: Literal["white", "random", "black", "grey"] = "white",
        flip: bool = False,
        shift: Annotated[int, Interval(ge=0, le=10_000)] = 0,
    ) -> None:
        self.size, self.seed = pair(image_size), seed
        self.background, self.flip, self.shift = background, flip, shift
        self.classes = sorted({row["category"] for row in catalogue()})

    def split(self, name: str) -> "EmojiSplit":
        if name not in ("train", "validation"):
            raise UserError(unknown_message("split", name, ("train", "validation")))
        validation = name == "validation"
        cells = [cell for cell, is_validation in enumerate(validation_mask()) if is_validation == validation]
        return EmojiSplit(self, cells, not validation)


class EmojiSplit:
    """Training or validation emoji, with their Unicode names in capitals."""

    def __init__(self, data: Emoji, cells: list[int], training: bool) -> None:
        self.data, self.cells, self.training = data, cells, training
        self.background = data.background if training or data.background in COLORS else "white"
        self.names = [catalogue()[cell]["name"] for cell in cells]
        self.labels = [data.classes.index(catalogue()[cell]["category"]) for cell in cells]
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.cells)

    def item(self, epoch: int, index: int) -> Sample:
        image = contain(premultiply(atlas()[self.cells[index]]), self.data.size)
        color = COLORS.get(self.background, COLORS["white"])
        if self._is_random:
            image, color = self._augment(image, color, seeded_generator(self.data.seed, epoch, index))
        return Sample(composite(image, color), label=self.labels[index], mask=image[3:])

    def _augment(self, image: Tensor, color: Color, random: torch.Generator) -> tuple[Tensor, Color]:
        # All numbers are drawn whatever the options: each option leaves the choices of the others as they were.
        red, green, blue = torch.rand(3, generator=random).tolist()
        mirrored = torch.rand((), generator=random).item() < 0.5
        down, right = torch.randint(-self.data.shift, self.data.shift + 1, (2,), generator=random).tolist()
        if self.data.flip and mirrored:
            image = image.flip(-1)
        return _shift(image, down, right), (red, green, blue) if self.background == "random" else color

    @property
    def _is_random(self) -> bool:
        return self.training and (self.background == "random" or self.data.flip or self.data.shift > 0)

    def _fingerprint(self) -> str:
        fields: list[object] = [[pixel_hashes()[cell] for cell in self.cells], self.data.size, self.background]
        if self._is_random:
            fields += [self.data.seed, self.data.flip, self.data.shift]
        return sha256_of(fields)


@lru_cache(maxsize=1)
def catalogue() -> list[dict[str, str]]:
    """Return code point, name, category and subcategory of every emoji."""
    return list(csv.DictReader((ASSETS / "emoji-64.csv").read_text(encoding="utf-8").splitlines()))


@lru_cache(maxsize=1)
def atlas() -> Tensor:
    """Return all emoji, RGBA uint8 (1636, 4, 64, 64), not premultiplied."""
    sheet = torch.from_numpy(np.array(open_image(ASSETS / "emoji-64.webp")))
    cells = rearrange(sheet, "(row y) (column x) c -> (row column) c y x", y=CELL_SIZE, column=COLUMNS)
    cells = cells[: len(catalogue())]
    return cells * (cells[:, 3:] > 0)


@lru_cache(maxsize=1)
def validation_mask() -> list[bool]:
    """Whether each emoji is for validation."""
    groups: dict[str, list[str]] = {}
    for pixels, row in zip(pixel_hashes(), catalogue(), strict=True):
        groups.setdefault(pixels, []).append(row["codepoint"])
    return [hash_fraction(min(groups[pixels])) < VALIDATION_FRACTION for pixels in pixel_hashes()]


@lru_cache(maxsize=1)
def pixel_hashes() -> list[str]:
    """Return the sha256 of each emoji's pixels."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in atlas()]


def _shift(image: Tensor, down: int, right: int) -> Tensor:
    shifted = torch.zeros_like(image)
    height, width = image.shape[1:]
    source = image[:, max(-down, 0) : max(height - down, 0), max(-right, 0) : max(width - right, 0)]
    shifted[:, max(down, 0) : max(height + down, 0), max(right, 0) : max(width + right, 0)] = source
    return shifted
