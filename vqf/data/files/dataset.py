"""Splits of sources whose images are files; the next readable image replaces an unreadable one."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from vqf.batch import Sample, Size
from vqf.data.files.image_file import ImageFile
from vqf.data.files.read_errors import DarkNote, ReadErrorCounter
from vqf.data.images.augment import Augmentation, ViewParams
from vqf.data.images.decode import Animated, CroppedImage, UnreadableError, read_crop
from vqf.data.images.pixel_values import PixelRange
from vqf.errors import UserError, quote_name
from vqf.seeding import seeded_generator

log = logging.getLogger("vqf")


class FileSource(Protocol):
    """What a split needs of its data source."""

    size: Size
    seed: int
    root: Path
    augmentation: Augmentation
    animated: Animated
    max_pixels: int
    pixel_range: PixelRange | None
    max_unreadable: float


class ImageSplit:
    """Training or validation images of a source.

    Args:
        names: Paths below `data.root`, or names of tar members.
        labels: int64 (N,), or None.
        content: Values whose `repr` identifies the images.
    """

    def __init__(
        self,
        data: FileSource,
        split_name: str,
        names: Sequence[str],
        labels: torch.Tensor | None,
        content: Iterable[object],
    ) -> None:
        self.data, self.split_name, self.names, self.labels = data, split_name, names, labels
        self.augmentation = data.augmentation if split_name == "train" else data.augmentation.deterministic()
        self.fingerprint = self._fingerprint(content)
        items = f"{split_name} images in '{data.root}'"
        self.dark_note = DarkNote()
        self.read_errors = ReadErrorCounter(items, len(names), data.max_unreadable, name_of=names.__getitem__)

    def open(self, index: int) -> Path | IO[bytes]:
        """Return the path of an image, or a stream of its bytes.

        Raises:
            UnreadableError: If missing or changed.
        """
        return self.data.root / self.names[index]

    def __len__(self) -> int:
        return len(self.names)

    def item(self, epoch: int, index: int) -> Sample:
        """Read an image, or the next readable one.

        Raises:
            UserError: If too many are unreadable.
        """
        view = self.augmentation.sample(seeded_generator(self.data.seed, epoch, index))
        for candidate in chain(range(index, len(self)), range(index)):
            try:
                crop = self._read_crop(candidate, view)
            except UnreadableError as error:
                self._record_unreadable(candidate, str(error))
                continue
            return Sample(view.apply(crop.image), self.label(candidate), crop_box=view.flip_box(crop.crop_box))
        raise UserError(
            f"data.root: none of the {len(self)} {self.split_name} images in '{self.data.root}' can be read"
        )

    def file(self, index: int) -> ImageFile:
        """Return the original file of an image, never another's."""
        return ImageFile(self.data, self.names[index], self.label(index), partial(self.open, index))

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def _read_crop(self, index: int, view: ViewParams) -> CroppedImage:
        if self.read_errors.flags[index]:
            raise UnreadableError("")
        data = self.data
        limits: dict[str, Any] = {"max_pixels": data.max_pixels, "animated": data.animated}
        limits["pixel_range"] = data.pixel_range
        crop = read_crop(self.open(index), data.size, view, resize=self.augmentation.resize, **limits)
        self.dark_note.check(self.names[index], crop.values, data.pixel_range)
        return crop

    @property
    def unreadable_limit(self) -> int:
        return self.read_errors.limit

    def read_error_flags(self) -> list[torch.Tensor]:
        """Return the shared flags of unreadable images, bool (N,)."""
        return [self.read_errors.flags]

    def check_read_errors(self) -> None:
        """Check the number of unreadable images.

        Raises:
            UserError: If it is too high.
        """
        self.read_errors.check()

    def _record_unreadable(self, index: int, reason: str) -> None:
        name = self.names[index]
        if self.read_errors.add(index, name, reason):
            log.warning(f"data.root: cannot read {quote_name(name)} ({reason}); the next image takes its place")

    def _fingerprint(self, content: Iterable[object]) -> str:
        data = self.data
        options: tuple[object, ...] = data.size, self.augmentation.fingerprint_fields, data.max_pixels, data.animated
        options += () if data.pixel_range is None else (data.pixel_range,)
        digest = hashlib.sha256(repr(options).encode())
        if self.augmentation.is_random:  # without random choices the seed changes nothing
            digest.update(repr(self.data.seed).encode())
        for value in content:
            digest.update(repr(value).encode())
        return digest.hexdigest()
