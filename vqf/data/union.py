"""Several data sources as one."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, overload

import torch

from vqf.batch import Sample, Size
from vqf.data.files.image_file import PictureFile
from vqf.errors import EmptyPartError, UserError
from vqf.protocols import ConditionReader, Data, Split, Streamed
from vqf.registry import ask, build, check, register
from vqf.seeding import mix

BESIDE = ("mask", "condition", "place")  # a picture
OPTION = r"(?<![\w/.'])data\."  # where an error names an option of a source, and no file


@register("data", "union")
class Union:
    """Data sources side by side; the label of a picture is the source that it is from.

    What a source holds out stays held out. An epoch is every picture of every source. Maps and places are there if
    every source has them.

    Args:
        parts: The sources by name, each a node of `data` as in `{name: folder, root: faces}`.
    """

    def __init__(self, image_size: int | Size, seed: int, *, parts: Mapping[str, Any]) -> None:
        if not parts:
            raise ValueError("parts is empty; name sources, as in data.parts.faces={name:folder,root:faces}")
        self.classes = list(parts)
        for name, node in parts.items():
            check("data", node, f"data.parts.{name}")
        self.sources = {name: _open(name, node, image_size, mix(seed, name)) for name, node in parts.items()}

    @staticmethod
    def condition_reader(parts: Mapping[str, Any]) -> ConditionReader | None:
        """Return what reads a map as every source reads its own; None if none of them says how.

        Raises:
            ValueError: If they do not read alike.
        """
        readers = {name: ask("data", node, "condition_reader", f"data.parts.{name}") for name, node in parts.items()}
        first, reader = next(iter(readers.items()))
        if other := next((name for name, each in readers.items() if each != reader), None):
            raise ValueError(f"data.parts: '{first}' and '{other}' have maps of different kinds, or one of them none")
        return reader

    def split(self, name: str) -> "UnionSplit":
        """Return "train" or "validation", of the sources that have one.

        Raises:
            EmptyPartError: If none has.
        """
        parts, empty = self._parts(name, self.sources)
        if not parts:
            raise empty or AssertionError("a part or a mistake")
        others, _ = self._parts("train" if name == "validation" else "validation", self.sources.keys() - parts.keys())
        kind = FilesUnion if all(hasattr(part, "file") for part in parts.values()) else UnionSplit
        return kind(parts, self.classes, others)

    def _parts(self, name: str, sources: Iterable[str]) -> tuple[dict[str, Split], EmptyPartError | None]:
        """Return a part of each source that has one, and what another says that has none."""
        parts, empty = {}, None
        for source in sources:
            try:
                with _worded(source):
                    parts[source] = self.sources[source].split(name)
            except EmptyPartError as error:
                empty = error
        return parts, empty


class UnionSplit:
    """The training parts of all sources, or the validation parts, one after the other.

    Args:
        parts: By source.
        classes: All sources.
        others: The other parts of sources that have none of these.
    """

    def __init__(self, parts: Mapping[str, Split], classes: Sequence[str], others: Mapping[str, Split]) -> None:
        if stream := next((name for name, part in parts.items() if isinstance(part, Streamed)), None):
            raise UserError(
                f"data.parts.{stream}: a stream cannot be one of several sources; copy its shards to a folder"
            )
        self.sources, self.parts, self.every = list(parts), list(parts.values()), {**parts, **others}
        counts = [len(part) for part in self.parts]
        self.ends = list(accumulate(counts))
        self.numbers = [classes.index(name) for name in parts]
        self.labels = torch.tensor(self.numbers).repeat_interleave(torch.tensor(counts))
        facts = [(name, len(part), part.fingerprint) for name, part in parts.items()]
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()

    def __len__(self) -> int:
        return self.ends[-1]

    def item(self, epoch: int, index: int) -> Sample:
        """Return a picture as it looks in an epoch, labelled with the number of its source."""
        source, place = self.find(index)
        with _worded(self.sources[source]):
            return replace(self.parts[source].item(epoch, place), label=self.numbers[source], **self.absent)

    @cached_property
    def absent(self) -> dict[str, Any]:
        """What not every source has beside its pictures, or not in one shape: a batch cannot have that."""
        firsts = [self._first(source) for source in self.every]
        shapes = {field: {getattr(getattr(each, field), "shape", None) for each in firsts} for field in BESIDE}
        return {field: None for field, found in shapes.items() if len(found) > 1}

    def _first(self, source: str) -> Sample:
        with _worded(source):
            return self.every[source].item(0, 0)

    def find(self, index: int) -> tuple[int, int]:
        """Return which of the sources that are here a picture is of, and the picture's number there."""
        index = range(len(self))[index]
        source = bisect_right(self.ends, index)
        return source, index - (self.ends[source - 1] if source else 0)

    def faults(self) -> list[torch.Tensor]:
        """Return which pictures cannot be read, source by source, as far as anybody has looked."""
        return [flags for part in self.parts for flags in getattr(part, "faults", list)()]

    def check_faults(self) -> None:
        """Stop if they are too many of a source.

        Raises:
            UserError: If so.
        """
        for name, part in zip(self.sources, self.parts, strict=True):
            with _worded(name):
                getattr(part, "check_faults", lambda: None)()


class FilesUnion(UnionSplit):
    """Of sources that all have files."""

    def __init__(self, parts: Mapping[str, Any], classes: Sequence[str], others: Mapping[str, Split]) -> None:
        super().__init__(parts, classes, others)
        self.names = _Names(self)

    def file(self, index: int) -> PictureFile:
        """Return a picture as the file that it is in its source."""
        source, place = self.find(index)
        file: PictureFile = self.parts[source].file(place)  # type: ignore[attr-defined]
        return file


class _Names(Sequence[str]):
    """The names of the pictures of a union, behind those of their sources."""

    def __init__(self, split: FilesUnion) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        source, place = self.split.find(index)
        return f"{self.split.sources[source]}/{self.split.parts[source].names[place]}"  # type: ignore[attr-defined]


@contextmanager
def _worded(name: str) -> Iterator[None]:
    """Let a mistake name the options of the source that makes it."""
    try:
        yield
    except UserError as error:
        raise type(error)(re.sub(OPTION, f"data.parts.{name}.", str(error))) from error


def _open(name: str, node: Mapping[str, Any], image_size: int | Size, seed: int) -> Data:
    with _worded(name):
        source: Data = build("data", node, image_size=image_size, seed=seed)
        return source
