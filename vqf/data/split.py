"""A part of a data source whose pictures are files: how they are seen, and what takes the place of a broken one.

The rule: a picture that cannot be read is replaced by the next one of its part that can, the first following the
last. It is named once in the log and counted; above `max_bad` the run stops. Every worker process and every rank
follows the same rule, so all of them see the same pictures.
"""

import hashlib
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Literal, NamedTuple, Protocol

import torch
from PIL import Image

from vqf.data.imaging import UnreadableError, open_picture, read, to_rgb
from vqf.errors import UserError
from vqf.protocols import Sample, Size
from vqf.randomness import generator

log = logging.getLogger("vqf")


class Source(Protocol):
    """What a data source says of its pictures, the same for both parts."""

    size: Size
    seed: int
    root: Path
    crop: Literal["center", "random"]
    flip: bool
    max_pixels: int
    max_bad: float


class Facts(NamedTuple):
    """What a file turned out to hold; the size is that of the upright picture."""

    format: str
    mode: str
    width: int
    height: int


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
        self.random_crop = part == "train" and data.crop == "random"
        self.flip = part == "train" and data.flip
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
        random = generator(self.data.seed, epoch, index)
        across, down, mirror = torch.rand(3, generator=random).tolist()
        if not self.random_crop:
            across = down = 0.5
        for each in (*range(index, len(self)), *range(index)):
            try:
                image = self._read(each, across, down)
            except UnreadableError as error:
                self._count(each, str(error))
                continue
            label = None if self.labels is None else int(self.labels[each])
            return Sample(image.flip(-1) if self.flip and mirror < 0.5 else image, label)
        raise UserError(f"data.root: none of the {len(self)} {self.part} pictures in '{self.data.root}' can be read")

    def stored(self, index: int) -> bytes:
        """Return the bytes of a picture's file.

        Raises:
            UnreadableError: If they cannot be had.
        """
        source = self.open(index)
        try:
            return source.read_bytes() if isinstance(source, Path) else source.read()
        except OSError as error:
            raise UnreadableError((error.strerror or type(error).__name__).lower()) from error

    def picture(self, index: int) -> Image.Image:
        """Return a whole picture, upright and in RGB.

        Raises:
            UnreadableError: If it cannot be read.
        """
        return to_rgb(open_picture(self.open(index), max_pixels=self.data.max_pixels))

    def facts(self, index: int, content: bytes) -> Facts:
        """Decode what `stored` returned, and say what it is.

        Raises:
            UnreadableError: If it is no picture that could be trained on.
        """
        image = open_picture(io.BytesIO(content), max_pixels=self.data.max_pixels)
        to_rgb(image)
        return Facts(image.format or "?", image.mode, *image.size)

    def _read(self, index: int, across: float, down: float) -> torch.Tensor:
        if self.bad[index]:
            raise UnreadableError("")
        source = self.open(index)
        return read(source, self.data.size, across=across, down=down, max_pixels=self.data.max_pixels)

    def _count(self, index: int, reason: str) -> None:
        if self.bad[index]:
            return
        self.bad[index] = True
        count = int(self.bad.sum())
        if count > tolerated(self.data.max_bad, len(self)) or count == len(self):
            raise UserError(
                f"data.max_bad={self.data.max_bad:g}: {count} of the {len(self)} {self.part} pictures in "
                f"'{self.data.root}' cannot be read; the last is '{self.names[index]}' ({reason})"
            )
        log.warning(f"data.root: cannot read '{self.names[index]}' ({reason}); the next picture takes its place")

    def _fingerprint(self, content: Iterable[object]) -> str:
        digest = hashlib.sha256(repr((self.data.size, self.random_crop, self.flip, self.data.max_pixels)).encode())
        if self.random_crop or self.flip:
            digest.update(repr(self.data.seed).encode())
        for each in content:
            digest.update(repr(each).encode())
        return digest.hexdigest()


def tolerated(max_bad: float, count: int) -> int:
    """Return how many of `count` may be unreadable: at least one unless the share is 0."""
    return max(int(max_bad * count), 1) if max_bad > 0 else 0
