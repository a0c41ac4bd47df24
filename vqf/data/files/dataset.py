"""A part of a data source whose images are files: how they are seen, and what takes the place of a broken one.

The rule: an image that cannot be read is replaced by the next one of its part that can, the first following the
last. It is named once in the log and counted; above `max_unreadable` the run stops. Every worker process and every rank
follows the same rule, so all of them see the same images.
"""

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
from vqf.data.images.augment import Augmentation, ViewParams
from vqf.data.images.decode import Animated, CroppedImage, UnreadableError, read_crop
from vqf.errors import UserError, quote_name
from vqf.seeding import seeded_generator

log = logging.getLogger("vqf")

MAX_LISTED = 100  # unreadable images that a line names


class FileSource(Protocol):
    """What a data source says of its images, the same for both parts."""

    size: Size
    seed: int
    root: Path
    augmentation: Augmentation
    animated: Animated
    max_pixels: int
    max_unreadable: float


class ImageSplit:
    """The images of a source that are for training, or for validation.

    Args:
        data: The source.
        split_name: "train" or "validation".
        names: The images' names.
        labels: int64, one of an image each, or none.
        content: What tells these images from others, for the fingerprint.
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
        self.unreadable = torch.zeros(len(names), dtype=torch.bool).share_memory_()  # known to all worker processes

    def open(self, index: int) -> Path | IO[bytes]:
        """Return where an image is read from.

        Raises:
            UnreadableError: If it is not there any more, or not what it was.
        """
        return self.data.root / self.names[index]

    def __len__(self) -> int:
        return len(self.names)

    def item(self, epoch: int, index: int) -> Sample:
        """Return an image as it looks in an epoch, or the next readable one.

        Raises:
            UserError: If too many images cannot be read.
        """
        view = self.augmentation.sample(seeded_generator(self.data.seed, epoch, index))
        for each in chain(range(index, len(self)), range(index)):
            try:
                shown = self._read_crop(each, view)
            except UnreadableError as error:
                self._record_unreadable(each, str(error))
                continue
            return Sample(view.apply(shown.image), self.label(each), crop_box=view.flip_box(shown.crop_box))
        raise UserError(
            f"data.root: none of the {len(self)} {self.split_name} images in '{self.data.root}' can be read"
        )

    def file(self, index: int) -> ImageFile:
        """Return an image as the file that it is."""
        return ImageFile(self.data, self.names[index], self.label(index), partial(self.open, index))

    def label(self, index: int) -> int | None:
        """Return the label of an image."""
        return None if self.labels is None else int(self.labels[index])

    def _read_crop(self, index: int, view: ViewParams) -> CroppedImage:
        if self.unreadable[index]:
            raise UnreadableError("")
        data = self.data
        limits: dict[str, Any] = {"max_pixels": data.max_pixels, "animated": data.animated}
        return read_crop(self.open(index), data.size, view, resize=self.augmentation.resize, **limits)

    @property
    def unreadable_limit(self) -> int:
        """How many images may be unreadable."""
        return allowed_unreadable(self.data.max_unreadable, len(self))

    def read_error_flags(self) -> list[torch.Tensor]:
        """Return which images cannot be read, as far as anybody has looked."""
        return [self.unreadable]

    def check_read_errors(self, last: str = "") -> None:
        """Stop if they are too many.

        Args:
            last: What is to be said of the one that was found just now.

        Raises:
            UserError: Once all that are known are named in the log.
        """
        count = int(self.unreadable.sum())
        if count <= self.unreadable_limit and count < len(self):
            return
        names = [self.names[i] for i in self.unreadable.nonzero().flatten().tolist()]
        log.warning(f"data.root: cannot read {summarize_names(names)}")
        raise UserError(
            f"data.max_unreadable={self.data.max_unreadable:g}: {count} of the {len(self)} {self.split_name} "
            f"images in "
            f"'{self.data.root}' cannot be read{last}"
        )

    def _record_unreadable(self, index: int, reason: str) -> None:
        if self.unreadable[index]:
            return
        self.unreadable[index] = True
        self.check_read_errors(f"; the last is {quote_name(self.names[index])} ({reason})")
        log.warning(
            f"data.root: cannot read {quote_name(self.names[index])} ({reason}); the next image takes its place"
        )

    def _fingerprint(self, content: Iterable[object]) -> str:
        facts = self.data.size, self.augmentation.fingerprint_fields, self.data.max_pixels, self.data.animated
        digest = hashlib.sha256(repr(facts).encode())
        if self.augmentation.is_random:
            digest.update(repr(self.data.seed).encode())
        for each in content:
            digest.update(repr(each).encode())
        return digest.hexdigest()


def summarize_names(names: Sequence[str]) -> str:
    """Word names, and of very many the first."""
    more = f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(quote_name, names[:MAX_LISTED])) + more


def allowed_unreadable(fraction: float, count: int) -> int:
    """Return how many of `count` may be unreadable: at least one unless the share is 0."""
    return max(int(fraction * count), 1) if fraction > 0 else 0
