"""Images with a map each, wherever both lie: they are cut and mirrored alike, and one that is broken spoils both."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import torch
from PIL import Image

from vqf.batch import Sample, Size
from vqf.data.files.dataset import ImageSplit
from vqf.data.files.image_file import PairFile
from vqf.data.images.augment import ViewParams
from vqf.data.images.decode import CroppedImage, UnreadableError
from vqf.data.images.maps import MapDecoder
from vqf.data.images.resize import Box, resize_box


class PairedImageSplit(ImageSplit, ABC):
    """The pairs of a source that are for training, or for validation.

    A class that derives from it sets `map_decoder` and `map_names`, the names of the maps, before it calls this one's
    constructor; the name is empty where an image has no map.
    """

    map_decoder: MapDecoder
    map_names: Sequence[str]

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
            **vars(file),
            map_decoder=self.map_decoder,
            map_name=self.map_names[index],
            open_map=partial(self._open_named_map, index),
        )

    def item(self, epoch: int, index: int) -> Sample:
        """Return a pair as it looks in an epoch, or the next readable one.

        Raises:
            UserError: If too many pairs cannot be read.
        """
        return unstack_map(super().item(epoch, index), self.map_decoder)

    def _read_crop(self, index: int, view: ViewParams) -> CroppedImage:
        shown = super()._read_crop(index, view)
        return stack_map(shown, self.file(index).decode_map(shown.shape), self.data.size, self.map_decoder)

    def _open_named_map(self, index: int) -> Path | IO[bytes]:
        if not self.map_names[index]:
            raise UnreadableError("no map")
        return self.open_map(index)


def stack_map(shown: CroppedImage, whole: Image.Image, size: Size, reading: MapDecoder) -> CroppedImage:
    """Return image and map on top of each other, (4, H, W) or (6, H, W), so that both are mirrored alike."""
    part = resize_box(whole, size, _map_box(whole, shown), reading.resampling)
    return shown._replace(image=torch.cat([shown.image, reading.to_tensor(part)]))


def unstack_map(sample: Sample, reading: MapDecoder) -> Sample:
    """Take the two apart again."""
    return replace(sample, image=sample.image[:3], condition=reading.to_condition(sample.image[3:]))


def _map_box(whole: Image.Image, shown: CroppedImage) -> Box:
    """Return the part of a map that shows what is shown of its image."""
    rows, columns = shown.shape
    box = shown.box.scale_by(whole.height / rows, whole.width / columns)
    return Box(box.left, box.top, min(box.right, whole.width), min(box.bottom, whole.height))
