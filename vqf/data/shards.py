"""Tar shards in the layout of webdataset (https://github.com/webdataset/webdataset), read as if they were a folder.

Members that share a name up to the first dot of it are one sample: `0001.jpg` and `0001.cls`. An index beside each
shard says where its members lie, so that any picture can be read at any time: the order is the one of every data
source, the same for any number of worker processes and ranks, and a run goes on where it stopped.
"""

import io
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import torch

from vqf.data.folder import EXTENSIONS
from vqf.data.imaging import MAX_PIXELS, UnreadableError
from vqf.data.listing import Names
from vqf.data.split import PictureSplit, tolerated
from vqf.data.tarindex import Index, Member, Tars, index_of
from vqf.errors import UserError, unknown
from vqf.protocols import Size, pair
from vqf.registry import register
from vqf.terminal import progress

log = logging.getLogger("vqf")

MANIFEST = "manifest.json"  # of pipeline=shard; names the classes
READERS = 8  # shards that are indexed side by side
CLASSES_AT_MOST = 1_000_000


class Picture(NamedTuple):
    """A sample of a shard: its picture, and what its label is read from."""

    shard: int
    image: Member
    label: Member | None


class Part(NamedTuple):
    """The shards of a part, their samples, and a label for each or none."""

    tars: Tars
    pictures: list[Picture]
    labels: list[int | str]


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
        if not any(part.pictures for part in self.parts.values()):
            named = " and ".join(f"data.{part}={pattern}" for part, pattern in patterns.items())
            raise UserError(f"data.root: no pictures in shards of '{self.root}'; {named}")
        self.classes, self.numbers = self._classes()

    def split(self, name: str) -> "ShardSplit":
        """Return "train" or "validation"."""
        if name not in self.parts:
            raise UserError(unknown("split", name, self.parts))
        part = self.parts[name]
        if not part.pictures:
            raise UserError(f"data.{name}={self.patterns[name]}: no pictures in such shards of '{self.root}'")
        labels = torch.tensor([self.numbers[each] for each in part.labels]) if self.classes else None
        return ShardSplit(self, name, part, labels)

    def _part(self, name: str, pattern: str | None, labels: bool) -> Part:
        paths = [] if pattern is None else find_shards(self.root, pattern, f"data.{name}")
        indices = _indices(paths, self.index)
        self._check_whole(paths, indices)
        pictures = [
            Picture(shard, *found)
            for shard, (path, index) in enumerate(zip(paths, indices, strict=True))
            for found in samples(path, index, self.image, "json" if self.label_key else "cls")
        ]
        tars = Tars(paths)
        return Part(tars, pictures, self._labels(tars, pictures) if labels else [])

    def _check_whole(self, paths: list[Path], indices: list[Index]) -> None:
        cut = [path for path, index in zip(paths, indices, strict=True) if not index.whole]
        if len(cut) > tolerated(self.max_bad, len(paths)):
            raise UserError(
                f"data.max_bad={self.max_bad:g}: {len(cut)} of {len(paths)} shards are cut short or damaged; "
                f"the last is '{cut[-1]}'"
            )
        for path in cut:
            log.warning(f"data.root: the shard '{path}' is cut short or damaged; what follows is left out")

    def _labels(self, tars: Tars, pictures: list[Picture]) -> list[int | str]:
        """Return what the label of each picture says; nothing unless all of them have one."""
        without = next((each for each in pictures if each.label is None), None)
        if without is None:
            return [_label(tars, each, self.label_key) for each in pictures]
        if self.label_key or any(each.label for each in pictures):
            ending = "json" if self.label_key else "cls"
            log.warning(f"data.root: no labels, because '{_name(tars, without)}' has no .{ending} beside it")
        return []

    def _classes(self) -> tuple[list[str], dict[int | str, int]]:
        """Return the names of the classes, and the number of each label."""
        parts = [part for part in self.parts.values() if part.pictures]
        if not all(part.labels for part in parts):
            return [], {}
        found = {label for part in parts for label in part.labels}
        if not all(isinstance(each, int) for each in found):
            names = sorted(str(each) for each in found)
            return names, {each: names.index(str(each)) for each in found}
        count = max(int(each) for each in found) + 1
        names = _manifest_classes(self.root / MANIFEST)
        return names if len(names) >= count else [str(i) for i in range(count)], {i: i for i in range(count)}


class ShardSplit(PictureSplit):
    """The pictures of the shards of a part. Where each lies is kept in arrays, which worker processes share."""

    def __init__(self, data: Shards, name: str, part: Part, labels: torch.Tensor | None) -> None:
        self.tars = part.tars
        self.shards = np.array([each.shard for each in part.pictures], dtype=np.int32)
        images = [each.image for each in part.pictures]
        self.places = np.array([(each.offset, each.size, each.crc) for each in images], dtype=np.int64)
        names = Names(_name(part.tars, each) for each in part.pictures)
        told = ["-"] * len(images) if labels is None else labels.tolist()
        content = ((names[i], image.size, image.crc, told[i]) for i, image in enumerate(images))
        super().__init__(data, name, names, labels, content)

    def open(self, index: int) -> IO[bytes]:
        """Return the bytes of a picture."""
        offset, size, crc = self.places[index].tolist()
        return io.BytesIO(self.tars.read(int(self.shards[index]), offset, size, crc))


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
    found = [path for name in names for path in (sorted(root.glob(name)) if set(name) & set("*?") else [root / name])]
    if twice := next((path for i, path in enumerate(found) if path in set(found[:i])), None):
        raise UserError(f"{option}={pattern}: names '{twice}' twice")
    return found


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
    for group in groups.values():
        endings = [image] if image else [each for each in group if f".{each.rpartition('.')[2]}" in EXTENSIONS]
        if endings and endings[0] in group:
            yield group[endings[0]], group.get(label)


def _indices(paths: Sequence[Path], folder: Path | None) -> list[Index]:
    with ThreadPoolExecutor(READERS) as pool, progress("index shards", len(paths)) as bar:
        made = []
        for each in pool.map(lambda path: index_of(path, folder), paths):
            made.append(each)
            bar.advance()
    return made


def _label(tars: Tars, picture: Picture, key: str | None) -> int | str:
    member = picture.label
    assert member is not None, "asked for where there is one"
    try:
        text = member.text
        if text is None:
            text = tars.read(picture.shard, member.offset, member.size, member.crc).decode()
        label: Any = text.strip() if key is None else json.loads(text)[key]
    except (UnreadableError, ValueError, KeyError, TypeError) as error:
        what = f"no field '{key}'" if isinstance(error, KeyError | TypeError) else str(error)
        raise UserError(f"data.label_key: '{_name(tars, picture)}' has no label beside it ({what})") from error
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "" or label in range(-(2**63), 0):
        raise UserError(f"data.label_key: the label of '{_name(tars, picture)}' is {label!r}, not a class")
    if isinstance(label, int) and label >= CLASSES_AT_MOST:
        raise UserError(f"data.label_key: the label of '{_name(tars, picture)}' is {label}, more than any class")
    return label


def _name(tars: Tars, picture: Picture) -> str:
    return f"{tars.paths[picture.shard].name}/{picture.image.key}.{picture.image.ending}"


def _manifest_classes(path: Path) -> list[str]:
    """Read the names of the classes that pipeline=shard left beside its shards; none where it did not."""
    try:
        classes: Iterable[Any] = json.loads(path.read_text(encoding="utf-8"))["classes"]
        return [str(each) for each in classes]
    except (OSError, ValueError, KeyError, TypeError):
        return []
