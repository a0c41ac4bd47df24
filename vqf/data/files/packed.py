"""File names and sizes in arrays that forked processes share."""

# Forked workers share arrays. A list would be copied into each of them, because reference counts are written.

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import NamedTuple, TypeVar, overload

import numpy as np

T = TypeVar("T")


class File(NamedTuple):
    """An image file."""

    name: str  # path below the root, with slashes
    size: int  # bytes; -1 for a missing file
    label: int | str | None = None  # from a table


class LazySequence(Sequence[T]):
    """A sequence that makes items on access, by `_get`."""

    def _get(self, index: int) -> T:
        """Return an item; 0 <= index < length."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._get(i) for i in range(*index.indices(len(self)))]
        return self._get(range(len(self))[index])


class PackedStrings(LazySequence[str]):
    """Strings in an array of characters and one of ends."""

    def __init__(self, names: Iterable[str]) -> None:
        # surrogateescape: file names on Linux are bytes, and need not be UTF-8.
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        text, start = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield text[start:end].decode("utf-8", "surrogateescape")
            start = end

    def _get(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


class PackedFiles(LazySequence[File]):
    """A sequence of files in arrays."""

    def __init__(self, files: Sequence[File]) -> None:
        self.names = PackedStrings(file.name for file in files)
        self.sizes = np.array([file.size for file in files], dtype=np.int64)
        labelled = any(file.label is not None for file in files)
        self.labels = [file.label for file in files] if labelled else None

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[File]:
        return map(File, self.names, self.sizes.tolist(), self.labels or repeat(None))

    def _get(self, index: int) -> File:
        return File(self.names[index], int(self.sizes[index]), self.labels[index] if self.labels else None)


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector."""
    # Among millions of new objects, none of them garbage, its passes take longer than making them.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
