"""Data sources."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from vqf.batch import Sample


class Split(Protocol):
    """Training or validation images. `item` is a pure function of seed, epoch and index."""

    fingerprint: str  # changes when the images do

    def __len__(self) -> int: ...

    def item(self, epoch: int, index: int) -> Sample: ...


@runtime_checkable
class StreamingSplit(Protocol):
    """A split that is fast only for rising indices; training streams it, in no exact order."""

    max_readers: int  # processes that can share it: ranks times data workers

    def stream(self, start: int, rank: int, world_size: int) -> Iterator[Sample]: ...  # endless, from step `start`


class ConditionReader(Protocol):
    """Reads a condition map from a file as its data source does, or raises ValueError.

    Readers with the same options are equal (`__eq__`).

    Optional member: `options` of `data=shard_pairs` that read such maps; by default a shard's channels decide.
    """

    num_classes: int  # of a label map, C; 0 where a map is an image

    def __call__(self, path: Path) -> Tensor: ...  # -> (C, H, W), not resized


class Data(Protocol):
    """A source of images. Wired: image_size, seed.

    Optional member: `condition_reader(...)`, a static function from some of the options, by name, to a
    `ConditionReader`. It opens no data.
    """

    classes: Sequence[str]  # names of the labels; empty where there are none

    def split(self, name: str) -> Split:
        """The split "train" or "validation".

        Raises:
            EmptySplitError: If it has no image.
        """
        ...
