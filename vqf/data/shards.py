"""Tar shards in the layout of webdataset (https://github.com/webdataset/webdataset), read as if they were a folder.

Members that share a name up to the first dot of it are one sample: `0001.jpg` and `0001.cls`. An index beside each
shard says where its members lie, so that any image can be read at any time: the order is the one of every data
source, the same for any number of worker processes and ranks, and a run goes on where it stopped. Shards that are not
in a folder are read from end to end: see `vqf.data.tar.streaming`.
"""

import io
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from vqf.batch import Size, pair
from vqf.data.files.dataset import ImageSplit, allowed_unreadable
from vqf.data.files.packed import gc_paused
from vqf.data.images.augment import DEFAULT_CROP_AREA, DEFAULT_CROP_RATIO, NO_JITTER, Augmentation, Crop, Resize
from vqf.data.images.decode import MAX_PIXELS, Animated, UnreadableError
from vqf.data.labels import class_numbers
from vqf.data.tar.contents import (
    CRC_MISSING,
    CRC_NO_LABEL,
    LOST_LABEL,
    IndexedShards,
    SampleIndexBuilder,
    iter_samples,
    load_indices,
)
from vqf.data.tar.index import TarReader
from vqf.data.tar.manifest import MANIFEST_NAME, class_names, listed_shards, read_manifest
from vqf.data.tar.members import SampleMembers
from vqf.data.tar.patterns import find_shards, is_streamed
from vqf.data.tar.remote import RemoteShards
from vqf.data.tar.streaming import StreamedShards, StreamSplit
from vqf.errors import EmptySplitError, UserError, unknown_message
from vqf.registry import register

log = logging.getLogger("vqf")

MAX_LISTED = 5  # shards that a line names


@register("data", "shards")
class Shards:
    """Tar shards of webdataset: images with labels from `.cls`, from a field of `.json`, or none.

    Each shard gets an index beside it, `name.tar.idx`, on first use. A shard that is missing although its index is
    there, one cut short, an image whose checksum is not the indexed one and one that cannot be decoded follow the
    rule of `data=folder`: the next image that can be read takes the place, up to `max_unreadable`.

    Shards at an address that webdataset opens are streamed, without an index: validation in order, training shuffled,
    in an order that depends on the number of ranks and workers.

    Args:
        root: The folder of the shards, or its address.
        train: The shards to train on, below the root, or addresses: webdataset's braces, such as
            `train-{0000..0146}.tar`, or wildcards, such as `train-*.tar`; several of them divided by `::`.
        validation: The same for validation.
        train_images: How many images the training shards hold, if they are streamed and the `manifest.json` of
            pipeline=shard is not beside them.
        validation_images: The same for validation.
        buffer: Images that each process which loads a stream holds, to shuffle them.
        labels: Whether labels are read.
        label_key: The field of `.json` that holds the label; by default it is all that `.cls` holds.
        classes: How many classes there are, where labels are numbers; by default what the shards or the manifest say.
        image: The ending of the image, where samples hold several; by default the first that is an image.
        index: A folder for the indices, where there are to be none beside the shards.
        crop: See `data=folder`, as for the following.
        crop_area: The least and the largest share of an image that crop=resized shows.
        crop_ratio: The least and the largest ratio of width to height of that part.
        flip: Mirror every other training image.
        jitter: How far brightness, contrast, saturation and hue of training images are changed.
        resize: "antialias" is bicubic; "cv2" the bilinear without antialiasing that taming-transformers scales with.
        animated: Whether an animation counts as unreadable, or its first frame as an image.
        max_pixels: The largest image that is decoded, width times height.
        max_unreadable: The share of unreadable and of missing images, and of shards cut short, one at least unless 0,
            above which the run stops.
    """

    condition: str | None = None  # the ending of maps

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        root: str | None = None,
        train: str | None = "train-*.tar",
        validation: str | None = "validation-*.tar",
        train_images: int | None = None,
        validation_images: int | None = None,
        buffer: int = 1000,
        labels: bool = True,
        label_key: str | None = None,
        classes: int | None = None,
        image: str | None = None,
        index: str | None = None,
        crop: Crop = "random",
        crop_area: Sequence[float] = DEFAULT_CROP_AREA,
        crop_ratio: Sequence[float] = DEFAULT_CROP_RATIO,
        flip: bool = True,
        jitter: Sequence[float] = NO_JITTER,
        resize: Resize = "antialias",
        animated: Animated = "refuse",
        max_pixels: int = MAX_PIXELS,
        max_unreadable: float = 0.01,
    ) -> None:
        if not 0 <= max_unreadable <= 1:
            raise ValueError(f"max_unreadable={max_unreadable} is not in [0, 1]")
        if buffer < 1:
            raise ValueError(f"buffer={buffer} is not a number of images from 1 on")
        self.size, self.seed = pair(image_size), seed
        self.augmentation = Augmentation(crop, crop_area, crop_ratio, flip, jitter, resize)
        self.animated, self.max_pixels, self.max_unreadable, self.shuffle_buffer = (
            animated,
            max_pixels,
            max_unreadable,
            buffer,
        )
        self.member_roles = SampleMembers(normalize_extension(image), label_key, self.condition)
        self.index = None if index is None else Path(index).expanduser()
        self.patterns = {"train": train, "validation": validation}
        self.remote: RemoteShards | None = None
        self.classes: list[str]
        if any(is_streamed(root, pattern, f"data.{part}") for part, pattern in self.patterns.items() if pattern):
            lengths = {"train": train_images, "validation": validation_images}
            self.remote = RemoteShards(root, self.patterns, lengths, classes if labels else 0)
            self.classes = self.remote.classes
            self.check_manifest(self.remote.manifest)
        else:
            self._index_shards(root, labels, classes)

    def split(self, name: str) -> "ShardSplit | StreamSplit":
        """Return "train" or "validation"."""
        if name not in self.patterns:
            raise UserError(unknown_message("split", name, self.patterns))
        if self.remote is not None:
            return self.streamed_split(name, self.remote.shards_of(name))
        part = self.contents[name]
        if not part.names:
            raise EmptySplitError(f"data.{name}={self.patterns[name]}: no images in such shards of '{self.root}'")
        labels = torch.tensor([self.class_numbers[each] for each in part.labels]) if self.classes else None
        return self.indexed_split(name, part, labels)

    def indexed_split(self, name: str, part: IndexedShards, labels: torch.Tensor | None) -> "ShardSplit":
        """Return a part whose shards are in a folder."""
        return ShardSplit(self, name, part, labels)

    def streamed_split(self, name: str, stream: StreamedShards) -> StreamSplit:
        """Return a part whose shards are not."""
        return StreamSplit(self, name, stream)

    def check_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Refuse shards that are read in another way than they were written."""

    def _index_shards(self, root: str | None, labels: bool, classes: int | None) -> None:
        """Find out what the shards of a folder hold."""
        if root is None:
            raise UserError("data.root: give the folder of the shards, or its address")
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"data.root: no folder '{root}'; point data.root to a folder of tar shards")
        self.manifest = read_manifest(self.root)
        self.check_manifest(self.manifest)
        self.manifest_shards = listed_shards(self.manifest)
        if self.manifest.get("finished") is False:
            log.warning(
                f"data.root: {MANIFEST_NAME} in '{self.root}' says that pipeline=shard has not finished writing it"
            )
        with gc_paused():
            self.contents = {part: self._index_split(part, pattern, labels) for part, pattern in self.patterns.items()}
        if not any(part.names for part in self.contents.values()):
            named = " and ".join(f"data.{part}={pattern}" for part, pattern in self.patterns.items())
            raise UserError(f"data.root: no images in shards of '{self.root}'; {named}")
        self.classes, self.class_numbers = self._class_numbers(classes)

    def digests(self) -> dict[Path, str]:
        """Return what the manifest says of the shards that are there: the sha256 of each."""
        paths = [] if self.remote else [path for part in self.contents.values() for path in part.tar_reader.paths]
        found = {
            path: self.manifest_shards[path.name].get("sha256") for path in paths if path.name in self.manifest_shards
        }
        return {path: known for path, known in found.items() if isinstance(known, str) and path.is_file()}

    def _index_split(self, name: str, pattern: str | None, labels: bool) -> IndexedShards:
        paths = [] if pattern is None else find_shards(self.root, pattern, f"data.{name}", self.manifest_shards)
        tars, found = TarReader(paths), SampleIndexBuilder(self.member_roles)
        cut, short = [], []
        for shard, (path, index) in enumerate(
            zip(paths, load_indices(paths, self.index, self.manifest_shards), strict=True)
        ):
            before = len(found.names)
            for picked in iter_samples(path, index, self.member_roles):
                found.add(tars, shard, picked, labels)
            if missing := self._count_missing(path, len(found.names) - before):
                found.add_missing(path.name, shard, missing)
                short.append(f"{missing} in '{path.name}'")
            elif not index.intact:
                cut.append(path)
        self._check_truncated(cut, len(paths))
        self._check_missing(short, found.missing_count, len(found.names), name)
        return found.build(tars, labels)

    def _count_missing(self, path: Path, count: int) -> int:
        """Return how many images the manifest has of a shard that are not in it."""
        if not self.manifest_shards:
            return 0
        known = self.manifest_shards.get(path.name)
        if known is None or known["images"] < count:
            said = "does not know" if known is None else f"has {known['images']} images, not {count}, of"
            log.warning(f"data.root: {MANIFEST_NAME} in '{self.root}' {said} the shard '{path.name}'")
            return 0
        missing: int = known["images"] - count
        return missing

    def _check_missing(self, short: list[str], missing: int, count: int, part: str) -> None:
        if not short:
            return
        what = f"{missing} of the {count} {part} images that {MANIFEST_NAME} in '{self.root}' names are not there: "
        what += ", ".join(short[:MAX_LISTED]) + (", and more" if len(short) > MAX_LISTED else "")
        if missing > allowed_unreadable(self.max_unreadable, count):
            raise UserError(f"data.max_unreadable={self.max_unreadable:g}: {what}")
        log.warning(f"data.root: {what}; others take their places")

    def _check_truncated(self, cut: list[Path], count: int) -> None:
        if len(cut) > allowed_unreadable(self.max_unreadable, count):
            raise UserError(
                f"data.max_unreadable={self.max_unreadable:g}: {len(cut)} of {count} shards are cut short or damaged; "
                f"the last is '{cut[-1]}'"
            )
        for path in cut:
            log.warning(f"data.root: the shard '{path}' is cut short or damaged; what follows is left out")

    def _class_numbers(self, count: int | None) -> tuple[list[str], dict[int | str | None, int]]:
        """Return the names of the classes, and the number of each label."""
        parts = [part for part in self.contents.values() if part.names]
        if not all(part.labels for part in parts):
            return [], {}
        found = {label for part in parts for label in part.labels} - {LOST_LABEL}
        if count is not None and (wrong := [each for each in found if isinstance(each, str) or each >= count]):
            raise UserError(f"data.classes={count}: there is a label {max(wrong, key=str)!r}, no number below that")
        names = class_names(self.manifest)
        plain = [str(i) for i in range(count or 0)]
        classes, numbers = class_numbers(found, names if len(names) >= len(plain) else plain)
        return classes, {LOST_LABEL: 0, **numbers}


class ShardSplit(ImageSplit):
    """The images of the shards of a part."""

    def __init__(
        self, data: Shards, name: str, part: IndexedShards, labels: torch.Tensor | None, more: Iterable[object] = ()
    ) -> None:
        self.tar_reader, self.shard_indices, self.locations = part.tar_reader, part.shard_indices, part.locations
        content = content_key(part.names, part.locations)
        told = [] if labels is None else [labels.tolist(), *data.classes]
        super().__init__(data, name, part.names, labels, itertools.chain(content, told, more))

    def open(self, index: int) -> IO[bytes]:
        """Return the bytes of an image."""
        return self.read_member(index, self.locations)

    def read_member(self, index: int, locations: np.ndarray) -> IO[bytes]:
        """Return the bytes of a member of a sample.

        Raises:
            UnreadableError: If they are not there, or not those that were indexed.
        """
        offset, size, crc = locations[index].tolist()
        if crc == CRC_MISSING:
            raise UnreadableError("it is not in its shard")
        if crc == CRC_NO_LABEL:
            raise UnreadableError("its label cannot be read")
        return io.BytesIO(self.tar_reader.read(int(self.shard_indices[index]), offset, size, crc))


def content_key(names: Sequence[str], locations: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """Yield what tells members from others, wherever in their shards they lie: name, size and checksum."""
    return ((name, size, crc) for name, (_, size, crc) in zip(names, locations.tolist(), strict=True))


def normalize_extension(option: str | None) -> str | None:
    """Return an ending as members have it."""
    return None if option is None else option.lower().lstrip(".")
