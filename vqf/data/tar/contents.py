"""What indexed shards hold: which samples, where in which shard, and their labels."""

import logging
from array import array
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqf.data.files.packed import PackedStrings
from vqf.data.images.decode import UnreadableError
from vqf.data.labels import parse_label
from vqf.data.tar.index import TarIndex, TarMember, TarReader, load_index
from vqf.data.tar.members import SampleMembers
from vqf.distributed import comm
from vqf.errors import UserError
from vqf.terminal import progress

log = logging.getLogger("vqf")

INDEX_THREADS = 8  # shards that are indexed side by side
LOST_LABEL = ""  # in place of a label
CRC_NO_LABEL, CRC_MISSING = (
    -1,
    -2,
)  # in place of a checksum: an image whose label is lost, or which is not there, is unreadable


@dataclass
class IndexedShards:
    """The samples of the shards of a part: in arrays, of which worker processes share one copy."""

    tar_reader: TarReader
    names: PackedStrings
    shard_indices: np.ndarray  # which shard each lies in
    locations: np.ndarray  # (images, 3): offset, size and checksum in it
    labels: list[int | str]  # one each, or none at all
    map_names: PackedStrings  # the names of their maps, empty where there is none
    map_locations: np.ndarray  # (images, 3)


class MemberSet(NamedTuple):
    """The members of a sample."""

    image: TarMember
    label: TarMember | None
    map: TarMember | None


class SampleIndexBuilder:
    """What is found in shards, sample by sample."""

    def __init__(self, roles: SampleMembers) -> None:
        self.member_roles = roles
        self.names: list[str] = []
        self.map_names: list[str] = []
        self.shard_indices, self.locations, self.map_locations = array("i"), array("q"), array("q")
        self.labels: list[int | str] = []
        self.first_unlabelled: str | None = None
        self.missing_count = 0

    def add(self, tars: TarReader, shard: int, picked: MemberSet, labels: bool) -> None:
        image, crc = picked.image, picked.image.crc
        name = f"{tars.paths[shard].name}/{image.key}.{image.extension}"
        self.names.append(name)
        self.shard_indices.append(shard)
        if not labels or picked.label is None:
            self.first_unlabelled = self.first_unlabelled or name
        else:
            try:
                self.labels.append(read_label(tars, shard, picked.label, self.member_roles.label_key, name))
            except UnreadableError:
                self.labels.append(LOST_LABEL)
                crc = CRC_NO_LABEL
        self.locations.extend((image.offset, image.size, crc))
        if self.member_roles.condition:
            self._add_map(picked.map)

    def _add_map(self, member: TarMember | None) -> None:
        self.map_names.append(f"{member.key}.{member.extension}" if member else "")
        self.map_locations.extend((member.offset, member.size, member.crc) if member else (0, 0, CRC_MISSING))

    def add_missing(self, name: str, shard: int, count: int) -> None:
        """Keep the places of images that a shard should hold, and does not."""
        self.names += [f"{name}/missing-{i}" for i in range(count)]
        self.shard_indices.extend([shard] * count)
        self.locations.extend((0, 0, CRC_MISSING) * count)
        self.labels += [LOST_LABEL] * count
        if self.member_roles.condition:
            self.map_names += [""] * count
            self.map_locations.extend((0, 0, CRC_MISSING) * count)
        self.missing_count += count

    def build(self, tars: TarReader, labels: bool) -> IndexedShards:
        told = len(self.labels) > self.missing_count
        if labels and self.first_unlabelled and (told or self.member_roles.label_key):
            log.warning(
                f"data.root: no labels, because '{self.first_unlabelled}' has no "
                f".{self.member_roles.label_extension} beside it"
            )
        kept = self.labels if told and not self.first_unlabelled else []
        shards, places, maps = (np.array(each) for each in (self.shard_indices, self.locations, self.map_locations))
        return IndexedShards(
            tars,
            PackedStrings(self.names),
            shards,
            places.reshape(-1, 3),
            kept,
            PackedStrings(self.map_names),
            maps.reshape(-1, 3),
        )


def iter_samples(path: Path, index: TarIndex, roles: SampleMembers) -> Iterator[MemberSet]:
    """Yield the members of every sample of a shard that has an image.

    Raises:
        UserError: If a sample has two members of one ending.
    """
    groups: dict[str, dict[str, TarMember]] = {}
    for member in index.members:
        group = groups.setdefault(member.key, {})
        if member.extension in group:
            raise UserError(f"data.root: the shard '{path}' holds '{member.key}.{member.extension}' twice")
        group[member.extension] = member
    if groups and not index.intact:
        groups.popitem()  # cut short, or perhaps its label is
    for group in groups.values():
        if (ending := roles.find_image(group)) is not None:
            yield MemberSet(group[ending], group.get(roles.label_extension), group.get(roles.find_map(group) or ""))


def load_indices(paths: Sequence[Path], folder: Path | None, listed: Collection[str] = ()) -> list[TarIndex]:
    """Return the index of every shard; one without members where a listed one is missing.

    Several are made at a time. Every process of a run begins at another shard, and finds those of the others made when
    it comes to them: so the first time costs each of them its share only.

    Raises:
        UserError: See `load_index`.
    """

    def made(path: Path) -> TarIndex:
        return load_index(path, folder, missing_ok=path.name in listed)

    first = len(paths) * comm.rank() // comm.world_size()
    found: list[TarIndex] = []
    with ThreadPoolExecutor(INDEX_THREADS) as pool, progress("index shards", len(paths)) as bar:
        for index in pool.map(made, [*paths[first:], *paths[:first]]):
            found.append(index)
            bar.advance()
    rest = len(paths) - first
    return [*found[rest:], *found[:rest]]


def read_label(tars: TarReader, shard: int, member: TarMember, key: str | None, name: str) -> int | str:
    """Return the label of a sample: a number, or the name of a class.

    Raises:
        UnreadableError: If its bytes cannot be had.
        UserError: If it has none, or one that cannot be.
    """
    text = member.text
    if text is None:
        text = tars.read(shard, member.offset, member.size, member.crc).decode("utf-8", "replace")
    return parse_label(text, key, name)
