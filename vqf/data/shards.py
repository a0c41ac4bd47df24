"""Tar shards in the layout of webdataset (https://github.com/webdataset/webdataset), read as if they were a folder.

Members that share a name up to the first dot of it are one sample: `0001.jpg` and `0001.cls`. An index beside each
shard says where its members lie, so that any picture can be read at any time: the order is the one of every data
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
from vqf.data.files.dataset import PictureSplit, tolerated
from vqf.data.files.packed import without_collector
from vqf.data.images.augment import AREA, RATIO, UNCHANGED, Crop, Resize, Views
from vqf.data.images.decode import MAX_PIXELS, Animated, UnreadableError
from vqf.data.labels import numbered
from vqf.data.tar.contents import GONE, LOST, NO_LABEL, Found, Part, indices, samples
from vqf.data.tar.index import Tars
from vqf.data.tar.manifest import NAME, class_names, listed_shards, read_manifest
from vqf.data.tar.members import Roles
from vqf.data.tar.patterns import find_shards, is_streamed
from vqf.data.tar.remote import Remote
from vqf.data.tar.streaming import Stream, StreamSplit
from vqf.errors import EmptyPartError, UserError, unknown
from vqf.registry import register

log = logging.getLogger("vqf")

NAMED = 5  # shards that a line names


@register("data", "shards")
class Shards:
    """Tar shards of webdataset: pictures with labels from `.cls`, from a field of `.json`, or none.

    Each shard gets an index beside it, `name.tar.idx`, on first use. A shard that is missing although its index is
    there, one cut short, a picture whose checksum is not the indexed one and one that cannot be decoded follow the
    rule of `data=folder`: the next picture that can be read takes the place, up to `max_bad`.

    Shards at an address that webdataset opens are streamed, without an index: validation in order, training shuffled,
    in an order that depends on the number of ranks and workers.

    Args:
        root: The folder of the shards, or its address.
        train: The shards to train on, below the root, or addresses: webdataset's braces, such as
            `train-{0000..0146}.tar`, or wildcards, such as `train-*.tar`; several of them divided by `::`.
        validation: The same for validation.
        train_pictures: How many pictures the training shards hold, if they are streamed and the `manifest.json` of
            pipeline=shard is not beside them.
        validation_pictures: The same for validation.
        buffer: Pictures that each process which loads a stream holds, to shuffle them.
        labels: Whether labels are read.
        label_key: The field of `.json` that holds the label; by default it is all that `.cls` holds.
        classes: How many classes there are, where labels are numbers; by default what the shards or the manifest say.
        image: The ending of the picture, where samples hold several; by default the first that is a picture.
        index: A folder for the indices, where there are to be none beside the shards.
        crop: See `data=folder`, as for the following.
        crop_area: The least and the largest share of a picture that crop=resized shows.
        crop_ratio: The least and the largest ratio of width to height of that part.
        flip: Mirror every other training picture.
        jitter: How far brightness, contrast, saturation and hue of training pictures are changed.
        resize: "antialias" is bicubic; "cv2" the bilinear without antialiasing that taming-transformers scales with.
        animated: Whether an animation counts as unreadable, or its first frame as a picture.
        max_pixels: The largest picture that is decoded, width times height.
        max_bad: The share of unreadable and of missing pictures, and of shards cut short, one at least unless 0, above
            which the run stops.
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
        train_pictures: int | None = None,
        validation_pictures: int | None = None,
        buffer: int = 1000,
        labels: bool = True,
        label_key: str | None = None,
        classes: int | None = None,
        image: str | None = None,
        index: str | None = None,
        crop: Crop = "random",
        crop_area: Sequence[float] = AREA,
        crop_ratio: Sequence[float] = RATIO,
        flip: bool = True,
        jitter: Sequence[float] = UNCHANGED,
        resize: Resize = "antialias",
        animated: Animated = "refuse",
        max_pixels: int = MAX_PIXELS,
        max_bad: float = 0.01,
    ) -> None:
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad={max_bad} is not in [0, 1]")
        if buffer < 1:
            raise ValueError(f"buffer={buffer} is not a number of pictures from 1 on")
        self.size, self.seed = pair(image_size), seed
        self.views = Views(crop, crop_area, crop_ratio, flip, jitter, resize)
        self.animated, self.max_pixels, self.max_bad, self.buffer = animated, max_pixels, max_bad, buffer
        self.roles = Roles(ending_of(image), label_key, self.condition)
        self.index = None if index is None else Path(index).expanduser()
        self.patterns = {"train": train, "validation": validation}
        self.remote: Remote | None = None
        self.classes: list[str]
        if any(is_streamed(root, pattern, f"data.{part}") for part, pattern in self.patterns.items() if pattern):
            lengths = {"train": train_pictures, "validation": validation_pictures}
            self.remote = Remote(root, self.patterns, lengths, classes if labels else 0)
            self.classes = self.remote.classes
            self.check_manifest(self.remote.manifest)
        else:
            self._index(root, labels, classes)

    def split(self, name: str) -> "ShardSplit | StreamSplit":
        """Return "train" or "validation"."""
        if name not in self.patterns:
            raise UserError(unknown("split", name, self.patterns))
        if self.remote is not None:
            return self.streamed(name, self.remote.stream(name))
        part = self.parts[name]
        if not part.names:
            raise EmptyPartError(f"data.{name}={self.patterns[name]}: no pictures in such shards of '{self.root}'")
        labels = torch.tensor([self.numbers[each] for each in part.labels]) if self.classes else None
        return self.indexed(name, part, labels)

    def indexed(self, name: str, part: Part, labels: torch.Tensor | None) -> "ShardSplit":
        """Return a part whose shards are in a folder."""
        return ShardSplit(self, name, part, labels)

    def streamed(self, name: str, stream: Stream) -> StreamSplit:
        """Return a part whose shards are not."""
        return StreamSplit(self, name, stream)

    def check_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Refuse shards that are read in another way than they were written."""

    def _index(self, root: str | None, labels: bool, classes: int | None) -> None:
        """Find out what the shards of a folder hold."""
        if root is None:
            raise UserError("data.root: give the folder of the shards, or its address")
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"data.root: no folder '{root}'; point data.root to a folder of tar shards")
        self.manifest = read_manifest(self.root)
        self.check_manifest(self.manifest)
        self.listed = listed_shards(self.manifest)
        if self.manifest.get("finished") is False:
            log.warning(f"data.root: {NAME} in '{self.root}' says that pipeline=shard has not finished writing it")
        with without_collector():
            self.parts = {part: self._part(part, pattern, labels) for part, pattern in self.patterns.items()}
        if not any(part.names for part in self.parts.values()):
            named = " and ".join(f"data.{part}={pattern}" for part, pattern in self.patterns.items())
            raise UserError(f"data.root: no pictures in shards of '{self.root}'; {named}")
        self.classes, self.numbers = self._classes(classes)

    def digests(self) -> dict[Path, str]:
        """Return what the manifest says of the shards that are there: the sha256 of each."""
        paths = [] if self.remote else [path for part in self.parts.values() for path in part.tars.paths]
        found = {path: self.listed[path.name].get("sha256") for path in paths if path.name in self.listed}
        return {path: known for path, known in found.items() if isinstance(known, str) and path.is_file()}

    def _part(self, name: str, pattern: str | None, labels: bool) -> Part:
        paths = [] if pattern is None else find_shards(self.root, pattern, f"data.{name}", self.listed)
        tars, found = Tars(paths), Found(self.roles)
        cut, short = [], []
        for shard, (path, index) in enumerate(zip(paths, indices(paths, self.index, self.listed), strict=True)):
            before = len(found.names)
            for picked in samples(path, index, self.roles):
                found.add(tars, shard, picked, labels)
            if missing := self._missing(path, len(found.names) - before):
                found.miss(path.name, shard, missing)
                short.append(f"{missing} in '{path.name}'")
            elif not index.whole:
                cut.append(path)
        self._check_cut(cut, len(paths))
        self._check_short(short, found.missed, len(found.names), name)
        return found.part(tars, labels)

    def _missing(self, path: Path, count: int) -> int:
        """Return how many pictures the manifest has of a shard that are not in it."""
        if not self.listed:
            return 0
        known = self.listed.get(path.name)
        if known is None or known["pictures"] < count:
            said = "does not know" if known is None else f"has {known['pictures']} pictures, not {count}, of"
            log.warning(f"data.root: {NAME} in '{self.root}' {said} the shard '{path.name}'")
            return 0
        missing: int = known["pictures"] - count
        return missing

    def _check_short(self, short: list[str], missing: int, count: int, part: str) -> None:
        if not short:
            return
        what = f"{missing} of the {count} {part} pictures that {NAME} in '{self.root}' names are not there: "
        what += ", ".join(short[:NAMED]) + (", and more" if len(short) > NAMED else "")
        if missing > tolerated(self.max_bad, count):
            raise UserError(f"data.max_bad={self.max_bad:g}: {what}")
        log.warning(f"data.root: {what}; others take their places")

    def _check_cut(self, cut: list[Path], count: int) -> None:
        if len(cut) > tolerated(self.max_bad, count):
            raise UserError(
                f"data.max_bad={self.max_bad:g}: {len(cut)} of {count} shards are cut short or damaged; "
                f"the last is '{cut[-1]}'"
            )
        for path in cut:
            log.warning(f"data.root: the shard '{path}' is cut short or damaged; what follows is left out")

    def _classes(self, count: int | None) -> tuple[list[str], dict[int | str | None, int]]:
        """Return the names of the classes, and the number of each label."""
        parts = [part for part in self.parts.values() if part.names]
        if not all(part.labels for part in parts):
            return [], {}
        found = {label for part in parts for label in part.labels} - {LOST}
        if count is not None and (wrong := [each for each in found if isinstance(each, str) or each >= count]):
            raise UserError(f"data.classes={count}: there is a label {max(wrong, key=str)!r}, no number below that")
        names = class_names(self.manifest)
        plain = [str(i) for i in range(count or 0)]
        classes, numbers = numbered(found, names if len(names) >= len(plain) else plain)
        return classes, {LOST: 0, **numbers}


class ShardSplit(PictureSplit):
    """The pictures of the shards of a part."""

    def __init__(
        self, data: Shards, name: str, part: Part, labels: torch.Tensor | None, more: Iterable[object] = ()
    ) -> None:
        self.tars, self.shards, self.places = part.tars, part.shards, part.places
        content = told_apart(part.names, part.places)
        told = [] if labels is None else [labels.tolist(), *data.classes]
        super().__init__(data, name, part.names, labels, itertools.chain(content, told, more))

    def open(self, index: int) -> IO[bytes]:
        """Return the bytes of a picture."""
        return self.member(index, self.places)

    def member(self, index: int, places: np.ndarray) -> IO[bytes]:
        """Return the bytes of a member of a sample.

        Raises:
            UnreadableError: If they are not there, or not those that were indexed.
        """
        offset, size, crc = places[index].tolist()
        if crc == GONE:
            raise UnreadableError("it is not in its shard")
        if crc == NO_LABEL:
            raise UnreadableError("its label cannot be read")
        return io.BytesIO(self.tars.read(int(self.shards[index]), offset, size, crc))


def told_apart(names: Sequence[str], places: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """Yield what tells members from others, wherever in their shards they lie: name, size and checksum."""
    return ((name, size, crc) for name, (_, size, crc) in zip(names, places.tolist(), strict=True))


def ending_of(option: str | None) -> str | None:
    """Return an ending as members have it."""
    return None if option is None else option.lower().lstrip(".")
