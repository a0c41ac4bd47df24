"""The split of `data=shards` in a folder."""

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Protocol

import numpy as np
import torch

from vqf.data.files.dataset import FileSource, ImageSplit
from vqf.data.images.decode import UnreadableError
from vqf.data.tar.contents import CRC_MISSING, CRC_NO_LABEL, IndexedShards


class ShardSource(FileSource, Protocol):
    """What a split needs of `data=shards`."""

    classes: list[str]


class ShardSplit(ImageSplit):
    """Training or validation images of indexed shards.

    Args:
        labels: int64 (N,), or None.
        extra: More values for the fingerprint.
    """

    def __init__(
        self,
        data: ShardSource,
        split_name: str,
        contents: IndexedShards,
        labels: torch.Tensor | None,
        extra: Iterable[object] = (),
    ) -> None:
        self.tar_reader, self.shard_indices, self.locations = (
            contents.tar_reader,
            contents.shard_indices,
            contents.locations,
        )
        members = content_key(contents.names, contents.locations)
        label_fields = [] if labels is None else [labels.tolist(), *data.classes]
        super().__init__(data, split_name, contents.names, labels, itertools.chain(members, label_fields, extra))

    def open(self, index: int) -> IO[bytes]:
        return self.read_member(index, self.locations)

    def read_member(self, index: int, locations: np.ndarray) -> IO[bytes]:
        """Return a stream of a member's bytes.

        Raises:
            UnreadableError: If they are missing or changed.
        """
        offset, size, crc = locations[index].tolist()
        if crc == CRC_MISSING:
            raise UnreadableError("missing in its shard")
        if crc == CRC_NO_LABEL:
            raise UnreadableError("its label cannot be read")
        return io.BytesIO(self.tar_reader.read(int(self.shard_indices[index]), offset, size, crc))


def content_key(names: Sequence[str], locations: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and CRC-32 of each member."""
    return ((name, size, crc) for name, (_, size, crc) in zip(names, locations.tolist(), strict=True))
