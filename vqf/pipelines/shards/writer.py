"""Write tar shards in the layout of webdataset (https://github.com/webdataset/webdataset)."""

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
FORMAT_BY_EXTENSION = {extension: name for name, extension in EXTENSION_BY_FORMAT.items()}
MAX_SIDE = {"jpg": 65_500, "webp": 16_383}  # largest side in pixels that a format can store
INTERPOLATED_KINDS = ("rgb", "grey")  # maps that may be interpolated: pixels are no labels, nor palette colors

T = TypeVar("T")
ImageFormat = Literal["original", "jpg", "png", "webp"]
Members = dict[str, bytes]  # files of a sample by extension


@dataclass(frozen=True)
class ShardTask:
    """Images of a split by index, or all images of one streamed shard."""

    name: str
    split_name: str
    indices: list[int]
    stream_shard: int | None = None
    previous: ShardRecord | None = None  # the incomplete shard of an earlier run


@dataclass(frozen=True)
class ShardSample:
    """A sample to write."""

    key: str
    name: str
    open: Callable[[], ImageFileLike]
    source_label: int | None = None  # label of its source in a concatenation; replaces the file's label


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards, in this process or in workers.

    Args:
        format: Format of the images; maps are PNG, or copied with "original".
        size: Shorter sides above this are scaled down to it; None keeps sizes.
        quality: Quality of jpg and webp, in [1, 100].
        maps: Options that will read the maps; None leaves maps out.
    """

    folder: Path
    splits: Mapping[str, Split]
    format: ImageFormat
    size: int | None
    quality: int
    maps: Mapping[str, Any] | None

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Write a shard atomically; keep the previous one if the new one has no more images."""
        with atomic_path(self.folder / task.name) as temporary:
            with temporary.open("wb") as file:
                contents = self._write_samples(file, task)
            if task.previous and contents.images <= task.previous.images:
                temporary.unlink()
                return task.previous
            size, digest = temporary.stat().st_size, sha256_of_file(temporary)
        return ShardRecord(task.name, contents.images, size, digest, contents.skipped, contents.broken)

    def has(self, split_name: str, key: str) -> bool:
        return key.isdecimal() and int(key) < len(self.splits[split_name])

    def can_read(self, split_name: str, key: str) -> bool:
        sample = self._sample_at(self.splits[split_name], int(key))
        return not isinstance(try_read(partial(self._members, sample)), ReadFailure)

    def _write_samples(self, file: IO[bytes], task: ShardTask) -> "ShardContents":
        from webdataset import TarWriter

        contents, samples = ShardContents(), self._iter_samples(task)
        with TarWriter(file, encoder=False, mtime=0) as tar:
            while sample := try_read(lambda: next(samples, None)):
                if isinstance(sample, ReadFailure):  # a stream broke off: nothing after this can be read
                    return replace(contents, broken=sample.reason)
                members = try_read(partial(self._members, sample))
                if isinstance(members, ReadFailure):
                    contents.skipped.append(SkippedSample(sample.key, sample.name, members.reason))
                    continue
                for group in members:  # TarWriter sorts the members of one call, and the map has to come last
                    tar.write({"__key__": sample.key, **group})
                contents = replace(contents, images=contents.images + 1)
        return contents

    def _iter_samples(self, task: ShardTask) -> Iterator[ShardSample]:
        split = self.splits[task.split_name]
        if task.stream_shard is None:
            for index in task.indices:
                yield self._sample_at(split, index)
        else:
            for i, file in enumerate(cast(StreamedShardSplit, split).iter_files(task.stream_shard)):
                yield ShardSample(f"{task.stream_shard:06d}-{i:06d}", file.name, partial(_unchanged, file))

    def _sample_at(self, split: Split, index: int) -> ShardSample:
        location = locate(split, index)
        classes = self.maps is not None and self.maps["maps"] == "labels"
        open_file = partial(as_image_file, location.split, location.local_index, classes)
        return ShardSample(f"{index:08d}", location.name, open_file, location.source_label)

    def _members(self, sample: ShardSample) -> list[Members]:
        file = sample.open()
        image, *maps = (
            self._copy_members(file) if self.format == "original" else self._render_members(file, self.format)
        )
        label = file.label if sample.source_label is None else sample.source_label
        label_member = {} if label is None else {"cls": str(label).encode()}
        return [{**image, "json": json.dumps({"name": sample.name}).encode(), **label_member}, *maps]

    def _copy_members(self, file: ImageFileLike) -> list[Members]:
        content = file.read_bytes()
        members = [{EXTENSION_BY_FORMAT[file.probe(content)[0]]: content}]
        if self.maps is not None:
            map_content, map_format = cast(PairFileLike, file).read_map()
            members.append({f"condition.{EXTENSION_BY_FORMAT[map_format]}": map_content})
        return members

    def _render_members(self, file: ImageFileLike, extension: str) -> list[Members]:
        image = file.load_image()
        size = _shrink_size(image.size, self.size)
        members = [{extension: self._encode(image, size, extension)}]
        if self.maps is not None:
            map_image = cast(PairFileLike, file).load_map((image.height, image.width))
            map_size = _map_size(map_image.size, image.size, size, self.size)
            interpolate = self.maps["maps"] in INTERPOLATED_KINDS
            members.append({"condition.png": self._encode(map_image, map_size, "png", interpolate)})
        return members

    def _encode(self, image: Image.Image, size: Size, extension: str, interpolate: bool = True) -> bytes:
        if max(size) > MAX_SIDE.get(extension, max(size)):
            raise ValueError(f"{size[0]} x {size[1]} pixels, more than a {extension} can store")
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC if interpolate else Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        image.save(buffer, FORMAT_BY_EXTENSION[extension], **({} if extension == "png" else {"quality": self.quality}))
        return buffer.getvalue()


@dataclass(frozen=True)
class ShardContents:
    """What was written and skipped; fields as in `ShardRecord`."""

    images: int = 0
    skipped: list[SkippedSample] = field(default_factory=list)
    broken: str = ""


@dataclass(frozen=True)
class ReadFailure:
    """Result of `try_read` if reading failed."""

    reason: str


def try_read(read: Callable[[], T]) -> T | ReadFailure:
    """Turn a ValueError or OSError of `read` into a `ReadFailure`; let a UserError pass."""
    try:
        return read()
    except UserError:
        raise
    except OSError as error:
        return ReadFailure((error.strerror or str(error)).lower())
    except ValueError as error:
        return ReadFailure(str(error))


def _shrink_size(size: Size, shorter: int | None) -> Size:
    if shorter is None or min(size) <= shorter:
        return size
    width, height = (max(round(side * shorter / min(size)), 1) for side in size)
    return width, height


def _map_size(map_size: Size, image_size: Size, new_image_size: Size, shorter: int | None) -> Size:
    if new_image_size == image_size:
        return map_size
    if shorter is not None and min(map_size) > shorter:
        return new_image_size
    return max(round(map_size[1] * new_image_size[0] / new_image_size[1]), 1), map_size[1]


def _unchanged(file: T) -> T:
    return file
