"""Pictures with a map each, wherever both lie: they are cut and mirrored alike, and one that is broken spoils both."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import torch
from PIL import Image

from vqf.batch import Sample, Size
from vqf.data.files.dataset import PictureSplit
from vqf.data.files.image_file import PairFile
from vqf.data.images.augment import View
from vqf.data.images.decode import Shown, UnreadableError
from vqf.data.images.maps import Reading
from vqf.data.images.resize import Box, resampled


class MappedSplit(PictureSplit, ABC):
    """The pairs of a source that are for training, or for validation.

    A class that derives from it sets `reading` and `maps`, the names of the maps, before it calls this one's
    constructor; the name is empty where a picture has no map.
    """

    reading: Reading
    maps: Sequence[str]

    @abstractmethod
    def open_map(self, index: int) -> Path | IO[bytes]:
        """Return where a map is read from.

        Raises:
            UnreadableError: If it is not there.
        """

    def file(self, index: int) -> PairFile:
        """Return a pair as the files that it is."""
        file = super().file(index)
        return PairFile(
            **vars(file), reading=self.reading, map_name=self.maps[index], open_map=partial(self._map, index)
        )

    def item(self, epoch: int, index: int) -> Sample:
        """Return a pair as it looks in an epoch, or the next readable one.

        Raises:
            UserError: If too many pairs cannot be read.
        """
        return apart(super().item(epoch, index), self.reading)

    def _read(self, index: int, view: View) -> Shown:
        shown = super()._read(index, view)
        return on_top(shown, self.file(index).understood(shown.shape), self.data.size, self.reading)

    def _map(self, index: int) -> Path | IO[bytes]:
        if not self.maps[index]:
            raise UnreadableError("no map")
        return self.open_map(index)


def on_top(shown: Shown, whole: Image.Image, size: Size, reading: Reading) -> Shown:
    """Return picture and map on top of each other, (4, H, W) or (6, H, W), so that both are mirrored alike."""
    part = resampled(whole, size, _box(whole, shown), reading.filter)
    return shown._replace(picture=torch.cat([shown.picture, reading.values(part)]))


def apart(sample: Sample, reading: Reading) -> Sample:
    """Take the two apart again."""
    return replace(sample, image=sample.image[:3], condition=reading.condition(sample.image[3:]))


def _box(whole: Image.Image, shown: Shown) -> Box:
    """Return the part of a map that shows what is shown of its picture."""
    rows, columns = shown.shape
    box = shown.box.at(whole.height / rows, whole.width / columns)
    return Box(box.left, box.top, min(box.right, whole.width), min(box.bottom, whole.height))
