"""Several data sources, concatenated."""

import logging
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import torch

from vqf.batch import Sample, Size
from vqf.data.files.image_file import ImageFile
from vqf.data.files.packed import LazySequence
from vqf.errors import EmptySplitError, UserError
from vqf.hashing import sha256_of
from vqf.protocols import ConditionReader, Data, Named, Split, StreamingSplit, TracksReadErrors
from vqf.registry import build, call_static, check_options, register
from vqf.seeding import hash_seed

log = logging.getLogger("vqf")

OPTIONAL_FIELDS = ("mask", "condition", "crop_box")  # of a Sample
OPTION_PATTERN = r"(?<![\w/.'])data\."  # an option of a source in an error message, not a file name


@register("data", "union")
class Union:
    """Several data sources as one; the label of an image is the number of its source.

    Condition maps, masks and crop boxes are kept if every source has them, in the same shape.

    Args:
        parts: The sources by name, each a node of `data` as in `{name: folder, root: faces}`.
    """

    def __init__(self, image_size: int | Size, seed: int, *, parts: Mapping[str, Any]) -> None:
        if not parts:
            raise ValueError("parts is empty; name sources, as in data.parts.faces={name:folder,root:faces}")
        self.classes = list(parts)
        for name, node in parts.items():  # all options, before any source opens its files
            check_options("data", node, f"data.parts.{name}")
        self.sources = {
            name: _build_source(name, node, image_size, hash_seed(seed, name)) for name, node in parts.items()
        }

    @staticmethod
    def condition_reader(parts: Mapping[str, Any]) -> ConditionReader | None:
        """Return the reader of condition maps, None if no source has maps.

        Raises:
            ValueError: If the sources read maps differently.
        """
        readers = {
            name: call_static("data", node, "condition_reader", f"data.parts.{name}") for name, node in parts.items()
        }
        first, reader = next(iter(readers.items()))
        if other := next((name for name, candidate in readers.items() if candidate != reader), None):
            raise ValueError(
                f"data.parts: '{first}' and '{other}' have condition maps of different kinds, or only one has maps"
            )
        return reader

    def split(self, name: str) -> "UnionSplit":
        """Return a split.

        Raises:
            EmptySplitError: If no source has it.
        """
        splits, error = self._open_splits(name, self.sources)
        if not splits:
            raise error or AssertionError("no split and no error")
        other_name = "train" if name == "validation" else "validation"
        others, _ = self._open_splits(other_name, self.sources.keys() - splits.keys())
        files = {name: split for name, split in splits.items() if isinstance(split, HasImageFiles)}
        if len(files) == len(splits):
            return ImageFileUnionSplit(files, splits, self.classes, others)
        return UnionSplit(splits, self.classes, others)

    def _open_splits(self, name: str, sources: Iterable[str]) -> tuple[dict[str, Split], EmptySplitError | None]:
        """Return the split of each source that has it, and the last error."""
        splits, last_error = {}, None
        for source in sources:
            try:
                with _prefix_errors(source):
                    splits[source] = self.sources[source].split(name)
            except EmptySplitError as error:
                last_error = error
        return splits, last_error


class UnionSplit:
    """One split of all sources, concatenated.

    Args:
        others: The other split of sources that lack this one, which gives both the same optional fields.
    """

    def __init__(self, splits: Mapping[str, Split], classes: Sequence[str], others: Mapping[str, Split]) -> None:
        if stream := next((name for name, split in splits.items() if isinstance(split, StreamingSplit)), None):
            raise UserError(
                f"data.parts.{stream}: a stream cannot be one of several sources; copy its shards to a folder"
            )
        self.source_names, self.splits, self.all_splits = list(splits), list(splits.values()), {**splits, **others}
        counts = [len(split) for split in self.splits]
        self.ends = list(accumulate(counts))
        self.source_labels = [classes.index(name) for name in splits]
        self.labels = torch.tensor(self.source_labels).repeat_interleave(torch.tensor(counts))
        self.fingerprint = sha256_of([(name, len(split), split.fingerprint) for name, split in splits.items()])

    def __len__(self) -> int:
        return self.ends[-1]

    def item(self, epoch: int, index: int) -> Sample:
        source, local_index = self.locate(index)
        with _prefix_errors(self.source_names[source]):
            sample = self.splits[source].item(epoch, local_index)
        return replace(sample, label=self.source_labels[source], **self.absent_fields)

    @cached_property
    def absent_fields(self) -> dict[str, Any]:
        """None for each field that not all sources have in one shape."""
        samples = [self._first_sample(source) for source in self.all_splits]
        shapes = {
            field: {getattr(getattr(sample, field), "shape", None) for sample in samples} for field in OPTIONAL_FIELDS
        }
        return {field: None for field, distinct in shapes.items() if len(distinct) > 1}

    def _first_sample(self, source: str) -> Sample:
        with _prefix_errors(source):
            return self.all_splits[source].item(0, 0)

    def locate(self, index: int) -> tuple[int, int]:
        """Convert an index into (position of the source, index in it)."""
        index = range(len(self))[index]
        source = bisect_right(self.ends, index)
        return source, index - (self.ends[source - 1] if source else 0)

    def read_error_flags(self) -> list[torch.Tensor]:
        tracking = [split for split in self.splits if isinstance(split, TracksReadErrors)]
        return [flags for split in tracking for flags in split.read_error_flags()]

    def check_read_errors(self) -> None:
        """Check each source's read errors.

        Raises:
            UserError: If they are too many.
        """
        for name, split in zip(self.source_names, self.splits, strict=True):
            with _prefix_errors(name):
                if isinstance(split, TracksReadErrors):
                    split.check_read_errors()


@runtime_checkable
class HasImageFiles(Named, Protocol):
    """A split whose images are all files."""

    def file(self, index: int) -> ImageFile: ...


class ImageFileUnionSplit(UnionSplit):
    """A union of sources whose images are all files."""

    def __init__(
        self,
        files: Mapping[str, "HasImageFiles"],
        splits: Mapping[str, Split],
        classes: Sequence[str],
        others: Mapping[str, Split],
    ) -> None:
        super().__init__(splits, classes, others)
        self.file_splits, self.names = list(files.values()), _UnionNames(self)

    def file(self, index: int) -> ImageFile:
        source, local_index = self.locate(index)
        return self.file_splits[source].file(local_index)


class _UnionNames(LazySequence[str]):
    def __init__(self, split: ImageFileUnionSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def _get(self, index: int) -> str:
        source, local_index = self.split.locate(index)
        return f"{self.split.source_names[source]}/{self.split.file_splits[source].names[local_index]}"


@contextmanager
def _prefix_errors(name: str) -> Iterator[None]:
    """Prefix options in messages and log lines: `data.root` becomes `data.parts.NAME.root`."""

    def prefix(record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(OPTION_PATTERN, f"data.parts.{name}.", record.getMessage()), ()
        return True

    log.addFilter(prefix)
    try:
        yield
    except UserError as error:
        raise type(error)(re.sub(OPTION_PATTERN, f"data.parts.{name}.", str(error))) from error
    finally:
        log.removeFilter(prefix)


def _build_source(name: str, node: Mapping[str, Any], image_size: int | Size, seed: int) -> Data:
    with _prefix_errors(name):
        source: Data = build("data", node, image_size=image_size, seed=seed)
        return source
