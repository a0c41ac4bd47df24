"""Samples of indexed shards."""

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
from vqf.data.tar.index import load_index
from vqf.data.tar.index_file import TarIndex, TarMember
from vqf.data.tar.inventory import MemberInventory
from vqf.data.tar.members import SampleMembers
from vqf.data.tar.reader import TarReader
from vqf.distributed import comm
from vqf.errors import UserError
from vqf.terminal import progress

log = logging.getLogger("vqf")

INDEX_THREADS = 8  # shards that are indexed at a time
LOST_LABEL = ""  # stands for an unreadable label
# In place of a CRC-32, for images that are known to be unreadable:
CRC_NO_LABEL = -1  # the label is unreadable
CRC_MISSING = -2  # the member is not in its shard


@dataclass
class IndexedShards:
    """The N samples of one split, in arrays that forked processes share."""

    tar_reader: TarReader
    names: PackedStrings  # SHARD/KEY.EXTENSION of the images
    shard_indices: np.ndarray  # (N,), into `tar_reader.paths`
    locations: np.ndarray  # (N, 3): offset, size and CRC-32 of the image
    labels: list[int | str]  # N, or none
    map_names: PackedStrings  # of the condition maps, empty for a missing one; none if there are no maps
    map_locations: np.ndarray  # (N, 3), or (0, 3)


class MemberSet(NamedTuple):
    """The members of one sample."""

    image: TarMember
    label: TarMember | None
    map: TarMember | None


class SampleIndexBuilder:
    """Collects samples for `IndexedShards`."""

    def __init__(self, roles: SampleMembers) -> None:
        self.member_roles = roles
        self.names: list[str] = []
        self.map_names: list[str] = []
        self.shard_indices, self.locations, self.map_locations = array("i"), array("q"), array("q")
        self.labels: list[int | str] = []
        self.first_unlabelled: str | None = None
        self.missing_count = 0

    def add(self, tars: TarReader, shard: int, sample: MemberSet, labels: bool) -> None:
        image, crc = sample.image, sample.image.crc
        name = f"{tars.paths[shard].name}/{image.key}.{image.extension}"
        self.names.append(name)
        self.shard_indices.append(shard)
        if not labels or sample.label is None:
            self.first_unlabelled = self.first_unlabelled or name
        else:
            try:
                self.labels.append(read_label(tars, shard, sample.label, self.member_roles.label_key, name))
            except UnreadableError:
                self.labels.append(LOST_LABEL)
                crc = CRC_NO_LABEL
        self.locations.extend((image.offset, image.size, crc))
        if self.member_roles.condition:
            self._add_map(sample.map)

    def _add_map(self, member: TarMember | None) -> None:
        self.map_names.append(f"{member.key}.{member.extension}" if member else "")
        self.map_locations.extend((member.offset, member.size, member.crc) if member else (0, 0, CRC_MISSING))

    def add_missing(self, name: str, shard: int, count: int) -> None:
        """Add unreadable samples for lost images, which keep the indices of others."""
        self.names += [f"{name}/missing-{i}" for i in range(count)]
        self.shard_indices.extend([shard] * count)
        self.locations.extend((0, 0, CRC_MISSING) * count)
        self.labels += [LOST_LABEL] * count
        if self.member_roles.condition:
            self.map_names += [""] * count
            self.map_locations.extend((0, 0, CRC_MISSING) * count)
        self.missing_count += count

    def build(self, tars: TarReader, labels: bool) -> IndexedShards:
        """Convert to arrays; keep labels if every image has one."""
        has_labels = len(self.labels) > self.missing_count
        if labels and self.first_unlabelled and (has_labels or self.member_roles.label_key):
            log.warning(
                f"data.root: no labels, because '{self.first_unlabelled}' has no "
                f".{self.member_roles.label_extension} beside it"
            )
        return IndexedShards(
            tars,
            PackedStrings(self.names),
            np.array(self.shard_indices),
            np.array(self.locations).reshape(-1, 3),
            self.labels if has_labels and not self.first_unlabelled else [],
            PackedStrings(self.map_names),
            np.array(self.map_locations).reshape(-1, 3),
        )


def iter_samples(path: Path, index: TarIndex, roles: SampleMembers, inventory: MemberInventory) -> Iterator[MemberSet]:
    """Yield the members of every sample with an image; count the others in `inventory`.

    Raises:
        UserError: If two members have one extension.
    """
    samples: dict[str, dict[str, TarMember]] = {}
    inventory.outside.update(index.left_out)
    members = index.members if roles.key == "first_dot" else [_with_key(member, roles) for member in index.members]
    for member in members:
        sample = samples.setdefault(member.key, {})
        if member.extension in sample:
            raise UserError(f"data.root: the shard '{path}' holds '{member.key}.{member.extension}' twice")
        sample[member.extension] = member
    if samples and not index.intact:
        samples.popitem()  # truncated, or its label may be lost
    for key, sample in samples.items():
        if (extension := inventory.add_sample(path.name, key, tuple(sample))) is not None:
            if inventory.first_json is None and "json" in sample:
                inventory.first_json = path, sample["json"]
            label, condition = sample.get(roles.label_extension), sample.get(roles.find_map(sample) or "")
            yield MemberSet(sample[extension], label, condition)


def _with_key(member: TarMember, roles: SampleMembers) -> TarMember:
    key, extension = roles.split(member.key, member.extension)
    return member._replace(key=key, extension=extension)


def load_indices(paths: Sequence[Path], folder: Path | None, listed: Collection[str] = ()) -> list[TarIndex]:
    """Load or build the index of every shard, `INDEX_THREADS` at a time, each rank from another shard on.

    Args:
        listed: Shards in the manifest, of which missing ones have empty indices.

    Raises:
        UserError: As in `load_index`.
    """

    def load(path: Path) -> TarIndex:
        return load_index(path, folder, missing_ok=path.name in listed)

    first = len(paths) * comm.rank() // comm.world_size()
    indices: list[TarIndex] = []
    with ThreadPoolExecutor(INDEX_THREADS) as pool, progress("index shards", len(paths)) as bar:
        for index in pool.map(load, [*paths[first:], *paths[:first]]):
            indices.append(index)
            bar.advance()
    rest = len(paths) - first
    return [*indices[rest:], *indices[:rest]]


def read_label(tars: TarReader, shard: int, member: TarMember, key: str | None, name: str) -> int | str:
    """Read the label of a sample.

    Raises:
        UnreadableError: If its bytes cannot be read.
        UserError: If it is missing or invalid.
    """
    text = member.text
    if text is None:
        text = tars.read(shard, member.offset, member.size, member.crc).decode("utf-8", "replace")
    return parse_label(text, key, name)
