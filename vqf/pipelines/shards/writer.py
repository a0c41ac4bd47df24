"""Samples into tar shards, in the layout of webdataset (https://github.com/webdataset/webdataset)."""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, cast

from PIL import Image

from vqf.atomic import atomic_path
from vqf.batch import Size
from vqf.dataloading.image_files import ImageFileLike, PairFileLike, StreamedShardSplit, locate
from vqf.errors import UserError
from vqf.hashing import sha256_of_file
from vqf.pipelines.shards.manifest import ShardRecord, SkippedSample
from vqf.pipelines.shards.rendered_file import as_image_file
from vqf.protocols import Split

EXTENSION_BY_FORMAT = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "PPM": "ppm",
    "TIFF": "tif",
}
FORMAT_BY_EXTENSION = {ending: name for name, ending in EXTENSION_BY_FORMAT.items()}
MAX_SIDE = {"jpg": 65_500, "webp": 16_383}  # pixels of a side that a format has room for
INTERPOLATED_KINDS = ("rgb", "grey")  # maps of which pixels may be mixed: neither labels nor colours that stand for one

T = TypeVar("T")
ImageFormat = Literal["original", "jpg", "png", "webp"]
Members = dict[str, bytes]  # the files of a sample, by their endings


@dataclass(frozen=True)
class ShardTask:
    """One shard: its file, and which images of a part it holds: so many, or all of a shard of a stream."""

    name: str
    split_name: str
    indices: list[int]
    stream_shard: int | None = None
    previous: ShardRecord | None = None  # what an earlier run could read of it, where not all


@dataclass(frozen=True)
class ShardSample:
    """A sample to be written."""

    key: str
    name: str
    open: Callable[[], ImageFileLike]
    source_label: int | None = None  # which it is from, where there are several


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards, in any process.

    Args:
        folder: Where to.
        splits: The images.
        format: Of the images; maps are copied with "original", and PNG with all others.
        size: What a shorter side that is longer is scaled down to; of maps, too.
        quality: Of jpg and webp.
        maps: The options that maps are to be read by; None leaves them out.
    """

    folder: Path
    splits: Mapping[str, Split]
    format: ImageFormat
    size: int | None
    quality: int
    maps: Mapping[str, Any] | None

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Write a shard beside its final name, flush it and rename it; what was had is kept if there is no more now."""
        with atomic_path(self.folder / task.name) as temporary:
            with temporary.open("wb") as file:
                held = self._write_samples(file, task)
            if task.previous and held.images <= task.previous.images:
                temporary.unlink()
                return task.previous
            facts = temporary.stat().st_size, sha256_of_file(temporary)
        return ShardRecord(task.name, held.images, *facts, held.skipped, held.broken)

    def has(self, part: str, key: str) -> bool:
        """Say whether a part has an image that a manifest names."""
        return key.isdecimal() and int(key) < len(self.splits[part])

    def can_read(self, part: str, key: str) -> bool:
        """Say whether an image that was left out can be written now."""
        entry = self._sample_at(self.splits[part], int(key))
        return not isinstance(try_read(partial(self._members, entry)), ReadFailure)

    def _write_samples(self, file: IO[bytes], task: ShardTask) -> "ShardContents":
        from webdataset import TarWriter

        held, entries = ShardContents(), self._iter_samples(task)
        with TarWriter(file, encoder=False, mtime=0) as tar:
            while entry := try_read(lambda: next(entries, None)):
                if isinstance(entry, ReadFailure):  # nor can what follows it
                    return replace(held, broken=entry.reason)
                members = try_read(partial(self._members, entry))
                if isinstance(members, ReadFailure):
                    held.skipped.append(SkippedSample(entry.key, entry.name, members.reason))
                    continue
                for each in members:  # the writer sorts those that it is given at once, and the map is to be last
                    tar.write({"__key__": entry.key, **each})
                held = replace(held, images=held.images + 1)
        return held

    def _iter_samples(self, task: ShardTask) -> Iterator[ShardSample]:
        split = self.splits[task.split_name]
        if task.stream_shard is None:
            for index in task.indices:
                yield self._sample_at(split, index)
        else:
            for i, file in enumerate(cast(StreamedShardSplit, split).iter_files(task.stream_shard)):
                yield ShardSample(f"{task.stream_shard:06d}-{i:06d}", file.name, lambda file=file: file)  # type: ignore[misc]

    def _sample_at(self, split: Split, index: int) -> ShardSample:
        place = locate(split, index)
        classes = self.maps is not None and self.maps["maps"] == "labels"
        opened = partial(as_image_file, place.split, place.local_index, classes)
        return ShardSample(f"{index:08d}", place.name, opened, place.source_label)

    def _members(self, entry: ShardSample) -> list[Members]:
        """Return image, label and name of a sample, and then its map."""
        file = entry.open()
        image, *maps = (
            self._copy_members(file) if self.format == "original" else self._render_members(file, self.format)
        )
        label = file.label if entry.source_label is None else entry.source_label
        told = {} if label is None else {"cls": str(label).encode()}
        return [{**image, "json": json.dumps({"name": entry.name}).encode(), **told}, *maps]

    def _copy_members(self, file: ImageFileLike) -> list[Members]:
        content = file.read_bytes()
        members = [{EXTENSION_BY_FORMAT[file.probe(content)[0]]: content}]
        if self.maps is not None:
            stored, kind = cast(PairFileLike, file).read_map()
            members.append({f"condition.{EXTENSION_BY_FORMAT[kind]}": stored})
        return members

    def _render_members(self, file: ImageFileLike, ending: str) -> list[Members]:
        image = file.load_image()
        small = _shrink_size(image.size, self.size)
        members = [{ending: self._encode(image, small, ending)}]
        if self.maps is not None:
            of_map = cast(PairFileLike, file).load_map((image.height, image.width))
            shape = _map_size(of_map.size, image.size, small, self.size)
            members.append(
                {"condition.png": self._encode(of_map, shape, "png", self.maps["maps"] in INTERPOLATED_KINDS)}
            )
        return members

    def _encode(self, image: Image.Image, size: Size, ending: str, mixed: bool = True) -> bytes:
        if max(size) > MAX_SIDE.get(ending, max(size)):
            raise ValueError(f"{size[0]} x {size[1]} pixels, more than a {ending} has room for")
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC if mixed else Image.Resampling.NEAREST)
        file = io.BytesIO()
        image.save(file, FORMAT_BY_EXTENSION[ending], **({} if ending == "png" else {"quality": self.quality}))
        return file.getvalue()


@dataclass(frozen=True)
class ShardContents:
    """What came into a shard, and what did not: see `ShardRecord`."""

    images: int = 0
    skipped: list[SkippedSample] = field(default_factory=list)
    broken: str = ""


@dataclass(frozen=True)
class ReadFailure:
    """Why something could not be read."""

    reason: str


def try_read(read: Callable[[], T]) -> T | ReadFailure:
    """Read something; what cannot be read raises a ValueError or an OSError, what the user has to mend a UserError."""
    try:
        return read()
    except UserError:
        raise
    except OSError as error:
        return ReadFailure((error.strerror or str(error)).lower())
    except ValueError as error:
        return ReadFailure(str(error))


def _shrink_size(size: Size, shorter: int | None) -> Size:
    """Return width and height with the shorter side scaled down, if it is longer than that."""
    if shorter is None or min(size) <= shorter:
        return size
    width, height = (max(round(side * shorter / min(size)), 1) for side in size)
    return width, height


def _map_size(size: Size, image: Size, small: Size, shorter: int | None) -> Size:
    """Return how large a map becomes whose image becomes `small`: it keeps that one's shape, whatever is rounded."""
    if small == image:
        return size
    if shorter is not None and min(size) > shorter:
        return small
    return max(round(size[1] * small[0] / small[1]), 1), size[1]
