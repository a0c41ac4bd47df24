"""Data sources."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vqf.batch import Sample


class Split(Protocol):
    """Training or validation images. `item` is a pure function of seed, epoch and index."""

    fingerprint: str  # changes when the images do

    def __len__(self) -> int: ...

    def item(self, epoch: int, index: int) -> Sample: ...


@runtime_checkable
class Labelled(Protocol):
    """A split whose labels are known without reading an image."""

    labels: Tensor | None  # (N,) int64


@runtime_checkable
class Named(Protocol):
    """A split whose images have names, such as paths of files."""

    names: Sequence[str]


@runtime_checkable
class LimitsUnreadable(Protocol):
    """A split that goes without some unreadable images."""

    unreadable_limit: int  # how many


@runtime_checkable
class TracksReadErrors(Protocol):
    """A split that records its unreadable images."""

    def read_error_flags(self) -> list[Tensor]: ...  # bool, in memory shared with the loader's workers

    def check_read_errors(self) -> None: ...  # raises a UserError if there are too many


@runtime_checkable
class StreamingSplit(Protocol):
    """A split that is fast only for rising indices; training streams it, in no exact order."""

    max_readers: int  # processes that can share it: ranks times data workers

    def stream(self, start: int, rank: int, world_size: int) -> Iterator[Sample]: ...  # endless, from step `start`


class ConditionReader(Protocol):
    """Reads a condition map from a file as its data source does, or raises ValueError.

    Readers with the same options are equal (`__eq__`).
    """

    num_classes: int  # of a label map, C; 0 where a map is an image

    def __call__(self, path: Path) -> Tensor: ...  # -> (C, H, W), not resized


@runtime_checkable
class StoredInShards(Protocol):
    """A reader of maps that `data=shard_pairs` can store; of others a map's channels decide how."""

    options: Mapping[str, Any]  # of `data=shard_pairs`, that read such maps


class Data(Protocol):
    """A source of images. Wired: image_size, seed.

    With condition maps it has a static function `condition_reader(...)` from some of the options, by name, to a
    `ConditionReader`. It opens no data.
    """

    classes: Sequence[str]  # names of the labels; empty where there are none

    def split(self, name: str) -> Split:
        """The split "train" or "validation".

        Raises:
            EmptySplitError: If it has no image.
        """
        ...
