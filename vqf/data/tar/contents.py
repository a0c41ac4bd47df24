"""What indexed shards hold: which samples, where in which shard, and their labels."""

import logging
from array import array
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqf.data.files.packed import Names
from vqf.data.images.decode import UnreadableError
from vqf.data.labels import parse_label
from vqf.data.tar.index import Index, Member, Tars, index_of
from vqf.data.tar.members import Roles
from vqf.distributed import comm
from vqf.errors import UserError
from vqf.terminal import progress

log = logging.getLogger("vqf")

READERS = 8  # shards that are indexed side by side
LOST = ""  # in place of a label
NO_LABEL, GONE = -1, -2  # in place of a checksum: a picture whose label is lost, or which is not there, is unreadable


@dataclass
class Part:
    """The samples of the shards of a part: in arrays, of which worker processes share one copy."""

    tars: Tars
    names: Names
    shards: np.ndarray  # which shard each lies in
    places: np.ndarray  # (pictures, 3): offset, size and checksum in it
    labels: list[int | str]  # one each, or none at all
    maps: Names  # the names of their maps, empty where there is none
    map_places: np.ndarray  # (pictures, 3)


class Picked(NamedTuple):
    """The members of a sample."""

    image: Member
    label: Member | None
    map: Member | None


class Found:
    """What is found in shards, sample by sample."""

    def __init__(self, roles: Roles) -> None:
        self.roles = roles
        self.names: list[str] = []
        self.maps: list[str] = []
        self.shards, self.places, self.map_places = array("i"), array("q"), array("q")
        self.labels: list[int | str] = []
        self.without: str | None = None
        self.missed = 0

    def add(self, tars: Tars, shard: int, picked: Picked, labels: bool) -> None:
        image, crc = picked.image, picked.image.crc
        name = f"{tars.paths[shard].name}/{image.key}.{image.ending}"
        self.names.append(name)
        self.shards.append(shard)
        if not labels or picked.label is None:
            self.without = self.without or name
        else:
            try:
                self.labels.append(read_label(tars, shard, picked.label, self.roles.label_key, name))
            except UnreadableError:
                self.labels.append(LOST)
                crc = NO_LABEL
        self.places.extend((image.offset, image.size, crc))
        if self.roles.condition:
            self._add_map(picked.map)

    def _add_map(self, member: Member | None) -> None:
        self.maps.append(f"{member.key}.{member.ending}" if member else "")
        self.map_places.extend((member.offset, member.size, member.crc) if member else (0, 0, GONE))

    def miss(self, name: str, shard: int, count: int) -> None:
        """Keep the places of pictures that a shard should hold, and does not."""
        self.names += [f"{name}/missing-{i}" for i in range(count)]
        self.shards.extend([shard] * count)
        self.places.extend((0, 0, GONE) * count)
        self.labels += [LOST] * count
        if self.roles.condition:
            self.maps += [""] * count
            self.map_places.extend((0, 0, GONE) * count)
        self.missed += count

    def part(self, tars: Tars, labels: bool) -> Part:
        told = len(self.labels) > self.missed
        if labels and self.without and (told or self.roles.label_key):
            log.warning(f"data.root: no labels, because '{self.without}' has no .{self.roles.label} beside it")
        kept = self.labels if told and not self.without else []
        shards, places, maps = (np.array(each) for each in (self.shards, self.places, self.map_places))
        return Part(tars, Names(self.names), shards, places.reshape(-1, 3), kept, Names(self.maps), maps.reshape(-1, 3))


def samples(path: Path, index: Index, roles: Roles) -> Iterator[Picked]:
    """Yield the members of every sample of a shard that has a picture.

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
        if (ending := roles.picture_among(group)) is not None:
            yield Picked(group[ending], group.get(roles.label), group.get(roles.map_among(group) or ""))


def indices(paths: Sequence[Path], folder: Path | None, listed: Collection[str] = ()) -> list[Index]:
    """Return the index of every shard; one without members where a listed one is missing.

    Several are made at a time. Every process of a run begins at another shard, and finds those of the others made when
    it comes to them: so the first time costs each of them its share only.

    Raises:
        UserError: See `index_of`.
    """

    def made(path: Path) -> Index:
        return index_of(path, folder, missing_ok=path.name in listed)

    first = len(paths) * comm.rank() // comm.world()
    found: list[Index] = []
    with ThreadPoolExecutor(READERS) as pool, progress("index shards", len(paths)) as bar:
        for index in pool.map(made, [*paths[first:], *paths[:first]]):
            found.append(index)
            bar.advance()
    rest = len(paths) - first
    return [*found[rest:], *found[:rest]]


def read_label(tars: Tars, shard: int, member: Member, key: str | None, name: str) -> int | str:
    """Return the label of a sample: a number, or the name of a class.

    Raises:
        UnreadableError: If its bytes cannot be had.
        UserError: If it has none, or one that cannot be.
    """
    text = member.text
    if text is None:
        text = tars.read(shard, member.offset, member.size, member.crc).decode("utf-8", "replace")
    return parse_label(text, key, name)
