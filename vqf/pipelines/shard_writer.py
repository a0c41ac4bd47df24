"""Samples into tar shards, in the layout of webdataset (https://github.com/webdataset/webdataset)."""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, cast

import numpy as np
from PIL import Image

from vqf.errors import UserError
from vqf.pipelines.files import Files, Joined, PairFile, PictureFile, Streams
from vqf.pipelines.pictures import to_image
from vqf.pipelines.shard_manifest import PARTIAL, Written, sha256
from vqf.protocols import Sample, Size, Split

ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "PPM": "ppm", "TIFF": "tif"}
BICUBIC = Image.Resampling.BICUBIC
FORMATS = {ending: name for name, ending in ENDINGS.items()}

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
        """Write a shard beside its final name, flush it and rename it."""
        temporary = self.folder / f".{task.name}{PARTIAL}"
        with temporary.open("wb") as file:
            held = self._fill(file, task)
            file.flush()
            os.fsync(file.fileno())
        facts = temporary.stat().st_size, sha256(temporary)
        temporary.replace(self.folder / task.name)
        return Written(task.name, held.pictures, *facts, held.left_out, held.broken)

    def _fill(self, file: IO[bytes], task: Task) -> "Held":
        from webdataset import TarWriter

        held, pictures = Held(), self._pictures(task)
        with TarWriter(file, encoder=False, mtime=0) as tar:
            while picture := attempt(lambda: next(pictures, None)):
                if isinstance(picture, Unreadable):  # nor can what follows it
                    return replace(held, broken=picture.reason)
                key, name, opened = picture
                members = attempt(partial(self._members, name, opened))
                if isinstance(members, Unreadable):
                    held.left_out[name] = members.reason
                    continue
                for each in members:  # the writer sorts those that it is given at once, and the picture is to be first
                    tar.write({"__key__": key, **each})
                held = replace(held, pictures=held.pictures + 1)
        return held

    def _pictures(self, task: Task) -> Iterator[tuple[str, str, Callable[[], PictureFile]]]:
        """Yield key and name of each, and what opens it."""
        split = self.parts[task.part]
        if task.stream is None:
            for index in task.indices:
                yield f"{index:08d}", name_of(split, index), partial(file_of, split, index)
        else:
            for i, file in enumerate(cast(Streams, split).files(task.stream)):
                yield f"{task.stream:06d}-{i:06d}", file.name, lambda file=file: file  # type: ignore[misc]

    def _members(self, name: str, opened: Callable[[], PictureFile]) -> list[Members]:
        """Return picture, label and name of a sample, and then its map."""
        file = opened()
        ending, content, shape = self._picture(file)
        told = {} if file.label is None else {"cls": str(file.label).encode()}
        members: Members = {ending: content, "json": json.dumps({"name": name}).encode(), **told}
        return [members, *([] if self.maps is None else [self._map(file, shape, self.maps)])]

    def _picture(self, file: PictureFile) -> tuple[str, bytes, Size]:
        if self.format != "original":
            image = file.picture()
            return self.format, self._encoded(image, self.format), (image.height, image.width)
        content = file.stored()
        kind, _, width, height = file.facts(content)
        return ENDINGS[kind], content, (height, width)

    def _map(self, file: PictureFile, shape: Size, maps: Mapping[str, Any]) -> Members:
        if self.format == "original":
            content, kind = cast(PairFile, file).stored_map()
            return {f"condition.{ENDINGS[kind]}": content}
        image = drawn_map(file.sample, maps) if isinstance(file, Drawn) else cast(PairFile, file).map(shape)
        mixed = maps["maps"] in ("rgb", "grey")  # no label, and no colour that stands for one, is mixed with another
        return {"condition.png": self._encoded(image, "png", BICUBIC if mixed else Image.Resampling.NEAREST)}

    def _encoded(self, image: Image.Image, ending: str, filter: Image.Resampling = BICUBIC) -> bytes:
        short = min(image.size)
        if self.size is not None and short > self.size:
            width, height = (max(round(side * self.size / short), 1) for side in image.size)
            image = image.resize((width, height), filter)
        file = io.BytesIO()
        image.save(file, FORMATS[ending], **({} if ending == "png" else {"quality": self.quality}))
        return file.getvalue()


@dataclass(frozen=True)
class Held:
    """What came into a shard, and what did not: see `Written`."""

    pictures: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    broken: str = ""


@dataclass(frozen=True)
class Drawn:
    """A picture of a source without files, as it looks in epoch 0."""

    name: str
    label: int | None
    sample: Sample

    def picture(self) -> Image.Image:
        return to_image(self.sample.image)

    def stored(self) -> bytes:
        raise AssertionError("format=original is refused where there are no files")

    def facts(self, content: bytes) -> tuple[str, str, int, int]:
        raise AssertionError("format=original is refused where there are no files")


@dataclass(frozen=True)
class Unreadable:
    """Why something could not be read."""

    reason: str


def attempt(read: Callable[[], T]) -> T | Unreadable:
    """Read something; what cannot be read raises a ValueError, and what the user has to mend a UserError."""
    try:
        return read()
    except UserError:
        raise
    except ValueError as error:
        return Unreadable(str(error))


def drawn_map(sample: Sample, maps: Mapping[str, Any]) -> Image.Image:
    """Return a map as a picture that the options `maps` read: RGB, grey, or the numbers of classes."""
    condition = sample.condition
    assert condition is not None, "every sample of a split has the same fields"
    if maps["maps"] != "labels":
        image = to_image(condition)
        return image.convert("L") if len(condition) == 1 else image
    numbers = condition.argmax(0).numpy()
    if maps["unlabelled"] is not None:
        numbers = np.where(numbers == 0, maps["unlabelled"], numbers - 1)
    return Image.fromarray(numbers.astype(np.uint8 if numbers.max() < 256 else np.uint16))


def file_of(split: Split, index: int) -> PictureFile:
    """Return a picture as the file that it is, if it is one, however often its source was joined with others."""
    if isinstance(split, Joined):
        source, place = split.find(index)
        return replace(file_of(split.parts[source], place), label=source)  # type: ignore[type-var]
    if isinstance(split, Files):
        return split.file(index)
    sample = split.item(0, index)
    return Drawn(name_of(split, index), sample.label, sample)


def name_of(split: Split, index: int) -> str:
    """Return the name of a picture, which tells nothing of the machine that it is on."""
    if isinstance(split, Joined):
        source, place = split.find(index)
        return f"{split.sources[source]}/{name_of(split.parts[source], place)}"
    names = getattr(split, "names", None)
    if names is None:
        return str(index)
    return Path(names[index]).name if os.path.isabs(names[index]) else str(names[index])
