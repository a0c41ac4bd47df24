"""A part of a data source whose pictures are files: how they are seen, and what takes the place of a broken one.

The rule: a picture that cannot be read is replaced by the next one of its part that can, the first following the
last. It is named once in the log and counted; above `max_bad` the run stops. Every worker process and every rank
follows the same rule, so all of them see the same pictures.
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
from vqf.data.files.image_file import PictureFile
from vqf.data.images.augment import View, Views
from vqf.data.images.decode import Animated, Shown, UnreadableError, read
from vqf.errors import UserError, quoted
from vqf.seeding import generator

log = logging.getLogger("vqf")

NAMED = 100  # unreadable pictures that a line names


class Source(Protocol):
    """What a data source says of its pictures, the same for both parts."""

    size: Size
    seed: int
    root: Path
    views: Views
    animated: Animated
    max_pixels: int
    max_bad: float


class PictureSplit:
    """The pictures of a source that are for training, or for validation.

    Args:
        data: The source.
        part: "train" or "validation".
        names: The pictures' names.
        labels: int64, one of a picture each, or none.
        content: What tells these pictures from others, for the fingerprint.
    """

    def __init__(
        self, data: Source, part: str, names: Sequence[str], labels: torch.Tensor | None, content: Iterable[object]
    ) -> None:
        self.data, self.part, self.names, self.labels = data, part, names, labels
        self.views = data.views if part == "train" else data.views.still()
        self.fingerprint = self._fingerprint(content)
        self.bad = torch.zeros(len(names), dtype=torch.bool).share_memory_()  # known to all worker processes

    def open(self, index: int) -> Path | IO[bytes]:
        """Return where a picture is read from.

        Raises:
            UnreadableError: If it is not there any more, or not what it was.
        """
        return self.data.root / self.names[index]

    def __len__(self) -> int:
        return len(self.names)

    def item(self, epoch: int, index: int) -> Sample:
        """Return a picture as it looks in an epoch, or the next readable one.

        Raises:
            UserError: If too many pictures cannot be read.
        """
        view = self.views.draw(generator(self.data.seed, epoch, index))
        for each in chain(range(index, len(self)), range(index)):
            try:
                shown = self._read(each, view)
            except UnreadableError as error:
                self._count(each, str(error))
                continue
            return Sample(view.finish(shown.picture), self.label(each), place=view.turn(shown.place))
        raise UserError(f"data.root: none of the {len(self)} {self.part} pictures in '{self.data.root}' can be read")

    def file(self, index: int) -> PictureFile:
        """Return a picture as the file that it is."""
        return PictureFile(self.data, self.names[index], self.label(index), partial(self.open, index))

    def label(self, index: int) -> int | None:
        """Return the label of a picture."""
        return None if self.labels is None else int(self.labels[index])

    def _read(self, index: int, view: View) -> Shown:
        if self.bad[index]:
            raise UnreadableError("")
        data = self.data
        limits: dict[str, Any] = {"max_pixels": data.max_pixels, "animated": data.animated}
        return read(self.open(index), data.size, view, resize=self.views.resize, **limits)

    @property
    def tolerance(self) -> int:
        """How many pictures may be unreadable."""
        return tolerated(self.data.max_bad, len(self))

    def faults(self) -> list[torch.Tensor]:
        """Return which pictures cannot be read, as far as anybody has looked."""
        return [self.bad]

    def check_faults(self, last: str = "") -> None:
        """Stop if they are too many.

        Args:
            last: What is to be said of the one that was found just now.

        Raises:
            UserError: Once all that are known are named in the log.
        """
        count = int(self.bad.sum())
        if count <= self.tolerance and count < len(self):
            return
        log.warning(f"data.root: cannot read {listed([self.names[i] for i in self.bad.nonzero().flatten().tolist()])}")
        raise UserError(
            f"data.max_bad={self.data.max_bad:g}: {count} of the {len(self)} {self.part} pictures in "
            f"'{self.data.root}' cannot be read{last}"
        )

    def _count(self, index: int, reason: str) -> None:
        if self.bad[index]:
            return
        self.bad[index] = True
        self.check_faults(f"; the last is {quoted(self.names[index])} ({reason})")
        log.warning(f"data.root: cannot read {quoted(self.names[index])} ({reason}); the next picture takes its place")

    def _fingerprint(self, content: Iterable[object]) -> str:
        facts = self.data.size, self.views.facts, self.data.max_pixels, self.data.animated
        digest = hashlib.sha256(repr(facts).encode())
        if self.views.random:
            digest.update(repr(self.data.seed).encode())
        for each in content:
            digest.update(repr(each).encode())
        return digest.hexdigest()


def listed(names: Sequence[str]) -> str:
    """Word names, and of very many the first."""
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(quoted, names[:NAMED])) + more


def tolerated(max_bad: float, count: int) -> int:
    """Return how many of `count` may be unreadable: at least one unless the share is 0."""
    return max(int(max_bad * count), 1) if max_bad > 0 else 0
