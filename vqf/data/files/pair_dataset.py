"""The split of a source with condition maps."""

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
    """Training or validation pairs of a source.

    Subclasses set `map_decoder` and `map_names`, where "" is a missing map, before they call this constructor.
    """

    map_decoder: MapDecoder
    map_names: Sequence[str]

    @abstractmethod
    def open_map(self, index: int) -> Path | IO[bytes]:
        """Return the path of a map, or a stream of its bytes.

        Raises:
            UnreadableError: If missing.
        """

    def file(self, index: int) -> PairFile:
        file = super().file(index)
        return PairFile(
            **vars(file),
            map_decoder=self.map_decoder,
            map_name=self.map_names[index],
            open_map=partial(self._open_named_map, index),
        )

    def item(self, epoch: int, index: int) -> Sample:
        """Read a pair, or the next readable one.

        Raises:
            UserError: If too many are unreadable.
        """
        return unstack_map(super().item(epoch, index), self.map_decoder)

    def _read_crop(self, index: int, view: ViewParams) -> CroppedImage:
        crop = super()._read_crop(index, view)
        return stack_map(crop, self.file(index).decode_map(crop.shape), self.data.size, self.map_decoder)

    def _open_named_map(self, index: int) -> Path | IO[bytes]:
        if not self.map_names[index]:
            raise UnreadableError("no map")
        return self.open_map(index)


def stack_map(crop: CroppedImage, full_map: Image.Image, size: Size, decoder: MapDecoder) -> CroppedImage:
    """Crop a map like its image, and stack both: (4, H, W) or (6, H, W)."""
    map_crop = resize_box(full_map, size, _map_box(full_map, crop), decoder.resampling)
    return crop._replace(image=torch.cat([crop.image, decoder.to_tensor(map_crop)]))


def unstack_map(sample: Sample, decoder: MapDecoder) -> Sample:
    """Split the channels of `stack_map`."""
    return replace(sample, image=sample.image[:3], condition=decoder.to_condition(sample.image[3:]))


def _map_box(full_map: Image.Image, crop: CroppedImage) -> Box:
    rows, columns = crop.shape
    box = crop.box.scale_by(full_map.height / rows, full_map.width / columns)
    return Box(box.left, box.top, min(box.right, full_map.width), min(box.bottom, full_map.height))
