"""Tar shards in the layout of webdataset (https://github.com/webdataset/webdataset), read as if they were a folder.

Members that share a name up to the first dot of it are one sample: `0001.jpg` and `0001.cls`. An index beside each
shard says where its members lie, so that any picture can be read at any time: the order is the one of every data
source, the same for any number of worker processes and ranks, and a run goes on where it stopped.
"""

import io
import itertools
import logging
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch

from vqf.data.folder import EXTENSIONS
from vqf.data.imaging import MAX_PIXELS, UnreadableError
from vqf.data.labels import manifest_classes, read_label
from vqf.data.listing import Names
from vqf.data.split import PictureSplit, tolerated
from vqf.data.tarindex import SUFFIX, Index, Member, Tars, index_of
from vqf.errors import UserError, unknown
from vqf.protocols import Size, pair
from vqf.registry import register
from vqf.terminal import progress

log = logging.getLogger("vqf")

MANIFEST = "manifest.json"  # of pipeline=shard; names the classes
READERS = 8  # shards that are indexed side by side
LOST, NO_LABEL = "", -1  # in place of a label and of a checksum: a picture whose label is lost counts as unreadable


@dataclass
class Part:
    """The samples of the shards of a part: in arrays, of which worker processes share one copy."""

    tars: Tars
    names: Names
    shards: np.ndarray  # which shard each lies in
    places: np.ndarray  # (pictures, 3): offset, size and checksum in it
    labels: list[int | str]  # one each, or none at all


@register("data", "shards")
class Shards:
    """Tar shards of webdataset: pictures with labels from `.cls`, from a field of `.json`, or none.

    Each shard gets an index beside it, `name.tar.idx`, on first use. A shard that is missing although its index is
    there, one cut short, a picture whose checksum is not the indexed one and one that cannot be decoded follow the
    rule of `data=folder`: the next picture that can be read takes the place, up to `max_bad`.

    Args:
        root: The folder of the shards.
        train: The shards to train on, below the root: webdataset's braces, such as `train-{0000..0146}.tar`, or
            wildcards, such as `train-*.tar`; several of them divided by `::`.
        validation: The same for validation.
        labels: Whether labels are read.
        label_key: The field of `.json` that holds the label; by default it is all that `.cls` holds.
        image: The ending of the picture, where samples hold several; by default the first that is a picture.
        index: A folder for the indices, where there are to be none beside the shards.
        crop: Where training pictures are cropped; validation pictures are cropped at the centre.
        flip: Mirror every other training picture.
        max_pixels: The largest picture that is decoded, width times height.
        max_bad: The share of unreadable pictures, and of shards cut short, one at least unless 0, above which the
            run stops.
    """

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        root: str,
        train: str | None = "train-*.tar",
        validation: str | None = "validation-*.tar",
        labels: bool = True,
        label_key: str | None = None,
        image: str | None = None,
        index: str | None = None,
        crop: Literal["center", "random"] = "random",
        flip: bool = True,
        max_pixels: int = MAX_PIXELS,
        max_bad: float = 0.01,
    ) -> None:
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad={max_bad} is not in [0, 1]")
        self.size, self.seed, self.root = pair(image_size), seed, Path(root).expanduser()
        self.crop, self.flip = crop, flip
        self.max_pixels, self.max_bad = max_pixels, max_bad
        self.image = None if image is None else image.lower().lstrip(".")
        self.label_key, self.index = label_key, None if index is None else Path(index).expanduser()
        if not self.root.is_dir():
            raise UserError(f"data.root: no folder '{root}'; point data.root to a folder of tar shards")
        patterns = {"train": train, "validation": validation}
        self.patterns = patterns
        self.parts = {part: self._part(part, pattern, labels) for part, pattern in patterns.items()}
        if not any(part.names for part in self.parts.values()):
            named = " and ".join(f"data.{part}={pattern}" for part, pattern in patterns.items())
            raise UserError(f"data.root: no pictures in shards of '{self.root}'; {named}")
        self.classes, self.numbers = self._classes()

    def split(self, name: str) -> "ShardSplit":
        """Return "train" or "validation"."""
        if name not in self.parts:
            raise UserError(unknown("split", name, self.parts))
        part = self.parts[name]
        if not part.names:
            raise UserError(f"data.{name}={self.patterns[name]}: no pictures in such shards of '{self.root}'")
        labels = torch.tensor([self.numbers[each] for each in part.labels]) if self.classes else None
        return ShardSplit(self, name, part, labels)

    def _part(self, name: str, pattern: str | None, labels: bool) -> Part:
        paths = [] if pattern is None else find_shards(self.root, pattern, f"data.{name}")
        ending = "json" if self.label_key else "cls"
        tars, found = Tars(paths), _Found(self.label_key, f".{ending}")
        cut = []
        for shard, index in enumerate(indices(paths, self.index)):
            if not index.whole:
                cut.append(paths[shard])
            for image, label in samples(paths[shard], index, self.image, ending):
                found.add(tars, shard, image, label if labels else None)
        self._check_cut(cut, len(paths))
        return found.part(tars, labels)

    def _check_cut(self, cut: list[Path], count: int) -> None:
        if len(cut) > tolerated(self.max_bad, count):
            raise UserError(
                f"data.max_bad={self.max_bad:g}: {len(cut)} of {count} shards are cut short or damaged; "
                f"the last is '{cut[-1]}'"
            )
        for path in cut:
            log.warning(f"data.root: the shard '{path}' is cut short or damaged; what follows is left out")

    def _classes(self) -> tuple[list[str], dict[int | str, int]]:
        """Return the names of the classes, and the number of each label."""
        parts = [part for part in self.parts.values() if part.names]
        if not all(part.labels for part in parts):
            return [], {}
        found = {label for part in parts for label in part.labels} - {LOST}
        if all(isinstance(each, int) for each in found):
            count = max((int(each) for each in found), default=-1) + 1
            names = manifest_classes(self.root / MANIFEST)
            names = names if len(names) >= count else [str(i) for i in range(count)]
            return names, {LOST: 0} | {i: i for i in range(count)}
        ordered = sorted(found, key=str)
        return [str(each) for each in ordered], {LOST: 0} | {each: i for i, each in enumerate(ordered)}


class ShardSplit(PictureSplit):
    """The pictures of the shards of a part."""

    def __init__(self, data: Shards, name: str, part: Part, labels: torch.Tensor | None) -> None:
        self.tars, self.shards, self.places = part.tars, part.shards, part.places
        content = ((each, size, crc) for each, (_, size, crc) in zip(part.names, part.places.tolist(), strict=True))
        told = [] if labels is None else [labels.tolist(), *data.classes]
        super().__init__(data, name, part.names, labels, itertools.chain(content, told))

    def open(self, index: int) -> IO[bytes]:
        """Return the bytes of a picture."""
        offset, size, crc = self.places[index].tolist()
        if crc == NO_LABEL:
            raise UnreadableError("its label cannot be read")
        return io.BytesIO(self.tars.read(int(self.shards[index]), offset, size, crc))


class _Found:
    """What is found in shards, sample by sample."""

    def __init__(self, key: str | None, ending: str) -> None:
        self.key, self.ending = key, ending
        self.names: list[str] = []
        self.shards, self.places = array("i"), array("q")
        self.labels: list[int | str] = []
        self.without: str | None = None

    def add(self, tars: Tars, shard: int, image: Member, label: Member | None) -> None:
        name = f"{tars.paths[shard].name}/{image.key}.{image.ending}"
        self.names.append(name)
        self.shards.append(shard)
        crc = image.crc
        if label is None:
            self.without = self.without or name
        else:
            try:
                self.labels.append(read_label(tars, shard, label, self.key, name))
            except UnreadableError:
                self.labels.append(LOST)
                crc = NO_LABEL
        self.places.extend((image.offset, image.size, crc))

    def part(self, tars: Tars, labels: bool) -> Part:
        if labels and self.without and (self.labels or self.key):
            log.warning(f"data.root: no labels, because '{self.without}' has no {self.ending} beside it")
        shards, places = np.array(self.shards, dtype=np.int32), np.array(self.places, dtype=np.int64)
        return Part(tars, Names(self.names), shards, places.reshape(-1, 3), [] if self.without else self.labels)


def find_shards(root: Path, pattern: str, option: str) -> list[Path]:
    """Return the shards that a pattern names: those of braces all, whether they are there or not.

    Raises:
        UserError: For a pattern that is none, and for addresses.
    """
    from webdataset.shardlists import expand_urls

    if any(sign in pattern for sign in ("://", "pipe:")):
        raise UserError(f"{option}={pattern}: shards are read from a folder; copy them below data.root first")
    try:
        names = expand_urls(pattern)
    except ValueError as error:
        raise UserError(f"{option}={pattern}: {str(error).lower()}; write it as in train-{{0000..0146}}.tar") from error
    found = [path for name in names for path in (_matching(root, name) if set(name) & set("*?") else [root / name])]
    return list(dict.fromkeys(found))


def _matching(root: Path, wildcard: str) -> list[Path]:
    """Find shards; the index of one that is missing stands for it."""
    indexed = (path.with_name(path.name.removesuffix(SUFFIX)) for path in root.glob(wildcard + SUFFIX))
    return sorted({*root.glob(wildcard), *indexed})


def samples(path: Path, index: Index, image: str | None, label: str) -> Iterator[tuple[Member, Member | None]]:
    """Yield picture and label of every sample of a shard that has a picture.

    Raises:
        UserError: If a sample has two members of one ending.
    """
    groups: dict[str, dict[str, Member]] = {}
    for member in index.members:
        group = groups.setdefault(member.key, {})
        if member.ending in group:
            raise UserError(f"data.root: the shard '{path}' holds '{member.key}.{member.ending}' twice")
        group[member.ending] = member
    if groups and not index.whole:
        groups.popitem()  # cut short, or perhaps its label is
    for group in groups.values():
        endings = [image] if image else [each for each in group if f".{each.rpartition('.')[2]}" in EXTENSIONS]
        if endings and endings[0] in group:
            yield group[endings[0]], group.get(label)


def indices(paths: Sequence[Path], folder: Path | None) -> Iterator[Index]:
    """Yield the index of every shard, several being made at a time."""
    with ThreadPoolExecutor(READERS) as pool, progress("index shards", len(paths)) as bar:
        for index in pool.map(lambda path: index_of(path, folder), paths):
            yield index
            bar.advance()
