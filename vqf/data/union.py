"""Several data sources as one."""

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
from vqf.data.files.image_file import ImageFile
from vqf.errors import EmptySplitError, UserError
from vqf.hashing import sha256_of
from vqf.protocols import ConditionReader, Data, Split, StreamingSplit
from vqf.registry import build, call_static, check_options, register
from vqf.seeding import hash_seed

OPTIONAL_FIELDS = ("mask", "condition", "crop_box")  # an image
OPTION_PATTERN = r"(?<![\w/.'])data\."  # where an error names an option of a source, and no file


@register("data", "union")
class Union:
    """Data sources side by side; the label of an image is the source that it is from.

    What a source holds out stays held out. An epoch is every image of every source. Maps and places are there if
    every source has them.

    Args:
        parts: The sources by name, each a node of `data` as in `{name: folder, root: faces}`.
    """

    def __init__(self, image_size: int | Size, seed: int, *, parts: Mapping[str, Any]) -> None:
        if not parts:
            raise ValueError("parts is empty; name sources, as in data.parts.faces={name:folder,root:faces}")
        self.classes = list(parts)
        for name, node in parts.items():
            check_options("data", node, f"data.parts.{name}")
        self.sources = {
            name: _build_source(name, node, image_size, hash_seed(seed, name)) for name, node in parts.items()
        }

    @staticmethod
    def condition_reader(parts: Mapping[str, Any]) -> ConditionReader | None:
        """Return what reads a map as every source reads its own; None if none of them says how.

        Raises:
            ValueError: If they do not read alike.
        """
        readers = {
            name: call_static("data", node, "condition_reader", f"data.parts.{name}") for name, node in parts.items()
        }
        first, reader = next(iter(readers.items()))
        if other := next((name for name, each in readers.items() if each != reader), None):
            raise ValueError(f"data.parts: '{first}' and '{other}' have maps of different kinds, or one of them none")
        return reader

    def split(self, name: str) -> "UnionSplit":
        """Return "train" or "validation", of the sources that have one.

        Raises:
            EmptyPartError: If none has.
        """
        parts, empty = self._open_splits(name, self.sources)
        if not parts:
            raise empty or AssertionError("a part or a mistake")
        others, _ = self._open_splits(
            "train" if name == "validation" else "validation", self.sources.keys() - parts.keys()
        )
        kind = ImageFileUnionSplit if all(hasattr(part, "file") for part in parts.values()) else UnionSplit
        return kind(parts, self.classes, others)

    def _open_splits(self, name: str, sources: Iterable[str]) -> tuple[dict[str, Split], EmptySplitError | None]:
        """Return a part of each source that has one, and what another says that has none."""
        parts, empty = {}, None
        for source in sources:
            try:
                with _prefix_errors(source):
                    parts[source] = self.sources[source].split(name)
            except EmptySplitError as error:
                empty = error
        return parts, empty


class UnionSplit:
    """The training parts of all sources, or the validation parts, one after the other.

    Args:
        splits: By source.
        classes: All sources.
        others: The other parts of sources that have none of these.
    """

    def __init__(self, splits: Mapping[str, Split], classes: Sequence[str], others: Mapping[str, Split]) -> None:
        if stream := next((name for name, part in splits.items() if isinstance(part, StreamingSplit)), None):
            raise UserError(
                f"data.parts.{stream}: a stream cannot be one of several sources; copy its shards to a folder"
            )
        self.source_names, self.splits, self.all_splits = list(splits), list(splits.values()), {**splits, **others}
        counts = [len(part) for part in self.splits]
        self.ends = list(accumulate(counts))
        self.source_labels = [classes.index(name) for name in splits]
        self.labels = torch.tensor(self.source_labels).repeat_interleave(torch.tensor(counts))
        facts = [(name, len(part), part.fingerprint) for name, part in splits.items()]
        self.fingerprint = sha256_of(facts)

    def __len__(self) -> int:
        return self.ends[-1]

    def item(self, epoch: int, index: int) -> Sample:
        """Return an image as it looks in an epoch, labelled with the number of its source."""
        source, place = self.locate(index)
        with _prefix_errors(self.source_names[source]):
            return replace(
                self.splits[source].item(epoch, place), label=self.source_labels[source], **self.absent_fields
            )

    @cached_property
    def absent_fields(self) -> dict[str, Any]:
        """What not every source has beside its images, or not in one shape: a batch cannot have that."""
        firsts = [self._first_sample(source) for source in self.all_splits]
        shapes = {field: {getattr(getattr(each, field), "shape", None) for each in firsts} for field in OPTIONAL_FIELDS}
        return {field: None for field, found in shapes.items() if len(found) > 1}

    def _first_sample(self, source: str) -> Sample:
        with _prefix_errors(source):
            return self.all_splits[source].item(0, 0)

    def locate(self, index: int) -> tuple[int, int]:
        """Return which of the sources that are here an image is of, and the image's number there."""
        index = range(len(self))[index]
        source = bisect_right(self.ends, index)
        return source, index - (self.ends[source - 1] if source else 0)

    def read_error_flags(self) -> list[torch.Tensor]:
        """Return which images cannot be read, source by source, as far as anybody has looked."""
        return [flags for part in self.splits for flags in getattr(part, "read_error_flags", list)()]

    def check_read_errors(self) -> None:
        """Stop if they are too many of a source.

        Raises:
            UserError: If so.
        """
        for name, part in zip(self.source_names, self.splits, strict=True):
            with _prefix_errors(name):
                getattr(part, "check_read_errors", lambda: None)()


class ImageFileUnionSplit(UnionSplit):
    """Of sources that all have files."""

    def __init__(self, splits: Mapping[str, Any], classes: Sequence[str], others: Mapping[str, Split]) -> None:
        super().__init__(splits, classes, others)
        self.names = _UnionNames(self)

    def file(self, index: int) -> ImageFile:
        """Return an image as the file that it is in its source."""
        source, place = self.locate(index)
        file: ImageFile = self.splits[source].file(place)  # type: ignore[attr-defined]
        return file


class _UnionNames(Sequence[str]):
    """The names of the images of a union, behind those of their sources."""

    def __init__(self, split: ImageFileUnionSplit) -> None:
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
        source, place = self.split.locate(index)
        return f"{self.split.source_names[source]}/{self.split.splits[source].names[place]}"  # type: ignore[attr-defined]


@contextmanager
def _prefix_errors(name: str) -> Iterator[None]:
    """Let a mistake name the options of the source that makes it."""
    try:
        yield
    except UserError as error:
        raise type(error)(re.sub(OPTION_PATTERN, f"data.parts.{name}.", str(error))) from error


def _build_source(name: str, node: Mapping[str, Any], image_size: int | Size, seed: int) -> Data:
    with _prefix_errors(name):
        source: Data = build("data", node, image_size=image_size, seed=seed)
        return source
