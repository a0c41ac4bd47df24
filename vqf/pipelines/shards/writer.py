"""Samples into tar shards, in the layout of webdataset (https://github.com/webdataset/webdataset)."""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, cast

from PIL import Image

from vqf.batch import Size
from vqf.dataloading.image_files import PairFile, PictureFile, Streams, place_of
from vqf.errors import UserError
from vqf.hashing import sha256
from vqf.pipelines.shards.manifest import PARTIAL, LeftOut, Written
from vqf.pipelines.shards.rendered_file import file_of
from vqf.protocols import Split

ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "PPM": "ppm", "TIFF": "tif"}
FORMATS = {ending: name for name, ending in ENDINGS.items()}
LONGEST = {"jpg": 65_500, "webp": 16_383}  # pixels of a side that a format has room for
MIXED = ("rgb", "grey")  # maps of which pixels may be mixed: neither labels nor colours that stand for one

T = TypeVar("T")
Format = Literal["original", "jpg", "png", "webp"]
Members = dict[str, bytes]  # the files of a sample, by their endings


@dataclass(frozen=True)
class Task:
    """One shard: its file, and which pictures of a part it holds: so many, or all of a shard of a stream."""

    name: str
    part: str
    indices: list[int]
    stream: int | None = None
    had: Written | None = None  # what an earlier run could read of it, where not all


@dataclass(frozen=True)
class Entry:
    """A sample to be written."""

    key: str
    name: str
    open: Callable[[], PictureFile]
    source: int | None = None  # which it is from, where there are several


@dataclass(frozen=True)
class Writer:
    """Writes shards, in any process.

    Args:
        folder: Where to.
        parts: The pictures.
        format: Of the pictures; maps are copied with "original", and PNG with all others.
        size: What a shorter side that is longer is scaled down to; of maps, too.
        quality: Of jpg and webp.
        maps: The options that maps are to be read by; None leaves them out.
    """

    folder: Path
    parts: Mapping[str, Split]
    format: Format
    size: int | None
    quality: int
    maps: Mapping[str, Any] | None

    def __call__(self, task: Task) -> Written:
        """Write a shard beside its final name, flush it and rename it; what was had is kept if there is no more now."""
        temporary = self.folder / f".{task.name}.{os.getpid()}{PARTIAL}"
        try:
            with temporary.open("wb") as file:
                held = self._fill(file, task)
                file.flush()
                os.fsync(file.fileno())
            if task.had and held.pictures <= task.had.pictures:
                return task.had
            facts = temporary.stat().st_size, sha256(temporary)
            temporary.replace(self.folder / task.name)
        finally:
            temporary.unlink(missing_ok=True)
        return Written(task.name, held.pictures, *facts, held.left_out, held.broken)

    def has(self, part: str, key: str) -> bool:
        """Say whether a part has a picture that a manifest names."""
        return key.isdecimal() and int(key) < len(self.parts[part])

    def can_read(self, part: str, key: str) -> bool:
        """Say whether a picture that was left out can be written now."""
        entry = self._entry(self.parts[part], int(key))
        return not isinstance(attempt(partial(self._members, entry)), Unreadable)

    def _fill(self, file: IO[bytes], task: Task) -> "Held":
        from webdataset import TarWriter

        held, entries = Held(), self._entries(task)
        with TarWriter(file, encoder=False, mtime=0) as tar:
            while entry := attempt(lambda: next(entries, None)):
                if isinstance(entry, Unreadable):  # nor can what follows it
                    return replace(held, broken=entry.reason)
                members = attempt(partial(self._members, entry))
                if isinstance(members, Unreadable):
                    held.left_out.append(LeftOut(entry.key, entry.name, members.reason))
                    continue
                for each in members:  # the writer sorts those that it is given at once, and the map is to be last
                    tar.write({"__key__": entry.key, **each})
                held = replace(held, pictures=held.pictures + 1)
        return held

    def _entries(self, task: Task) -> Iterator[Entry]:
        split = self.parts[task.part]
        if task.stream is None:
            for index in task.indices:
                yield self._entry(split, index)
        else:
            for i, file in enumerate(cast(Streams, split).files(task.stream)):
                yield Entry(f"{task.stream:06d}-{i:06d}", file.name, lambda file=file: file)  # type: ignore[misc]

    def _entry(self, split: Split, index: int) -> Entry:
        place = place_of(split, index)
        classes = self.maps is not None and self.maps["maps"] == "labels"
        opened = partial(file_of, place.split, place.number, classes)
        return Entry(f"{index:08d}", place.name, opened, place.source)

    def _members(self, entry: Entry) -> list[Members]:
        """Return picture, label and name of a sample, and then its map."""
        file = entry.open()
        picture, *maps = self._copied(file) if self.format == "original" else self._drawn(file, self.format)
        label = file.label if entry.source is None else entry.source
        told = {} if label is None else {"cls": str(label).encode()}
        return [{**picture, "json": json.dumps({"name": entry.name}).encode(), **told}, *maps]

    def _copied(self, file: PictureFile) -> list[Members]:
        content = file.stored()
        members = [{ENDINGS[file.facts(content)[0]]: content}]
        if self.maps is not None:
            stored, kind = cast(PairFile, file).stored_map()
            members.append({f"condition.{ENDINGS[kind]}": stored})
        return members

    def _drawn(self, file: PictureFile, ending: str) -> list[Members]:
        image = file.picture()
        small = _shrunk(image.size, self.size)
        members = [{ending: self._encoded(image, small, ending)}]
        if self.maps is not None:
            of_map = cast(PairFile, file).map((image.height, image.width))
            shape = _shape_of_map(of_map.size, image.size, small, self.size)
            members.append({"condition.png": self._encoded(of_map, shape, "png", self.maps["maps"] in MIXED)})
        return members

    def _encoded(self, image: Image.Image, size: Size, ending: str, mixed: bool = True) -> bytes:
        if max(size) > LONGEST.get(ending, max(size)):
            raise ValueError(f"{size[0]} x {size[1]} pixels, more than a {ending} has room for")
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC if mixed else Image.Resampling.NEAREST)
        file = io.BytesIO()
        image.save(file, FORMATS[ending], **({} if ending == "png" else {"quality": self.quality}))
        return file.getvalue()


@dataclass(frozen=True)
class Held:
    """What came into a shard, and what did not: see `Written`."""

    pictures: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    broken: str = ""


@dataclass(frozen=True)
class Unreadable:
    """Why something could not be read."""

    reason: str


def attempt(read: Callable[[], T]) -> T | Unreadable:
    """Read something; what cannot be read raises a ValueError or an OSError, what the user has to mend a UserError."""
    try:
        return read()
    except UserError:
        raise
    except OSError as error:
        return Unreadable((error.strerror or str(error)).lower())
    except ValueError as error:
        return Unreadable(str(error))


def _shrunk(size: Size, shorter: int | None) -> Size:
    """Return width and height with the shorter side scaled down, if it is longer than that."""
    if shorter is None or min(size) <= shorter:
        return size
    width, height = (max(round(side * shorter / min(size)), 1) for side in size)
    return width, height


def _shape_of_map(size: Size, picture: Size, small: Size, shorter: int | None) -> Size:
    """Return how large a map becomes whose picture becomes `small`: it keeps that one's shape, whatever is rounded."""
    if small == picture:
        return size
    if shorter is not None and min(size) > shorter:
        return small
    return max(round(size[1] * small[0] / small[1]), 1), size[1]
