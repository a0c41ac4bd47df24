"""Many images in little memory, all of which worker processes share: a list would be copied into each of them."""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import NamedTuple, overload

import numpy as np


class File(NamedTuple):
    """An image: its path below the root, with slashes, its length in bytes, and the label that a table gives it."""

    name: str
    size: int  # -1 where there is no such file
    label: int | str | None = None


class PackedStrings(Sequence[str]):
    """Many strings in two arrays."""

    def __init__(self, names: Iterable[str]) -> None:
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

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


class PackedFiles(Sequence[File]):
    """Many images in arrays, see `PackedStrings`; labels of tables are few words, and shared."""

    def __init__(self, files: Sequence[File]) -> None:
        self.names = PackedStrings(file.name for file in files)
        self.sizes = np.array([file.size for file in files], dtype=np.int64)
        told = any(file.label is not None for file in files)
        self.labels = [file.label for file in files] if told else None

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[File]:
        return map(File, self.names, self.sizes.tolist(), self.labels or repeat(None))

    @overload
    def __getitem__(self, index: int) -> File: ...
    @overload
    def __getitem__(self, index: slice) -> list[File]: ...
    def __getitem__(self, index: int | slice) -> File | list[File]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return File(self.names[index], int(self.sizes[index]), self.labels[index] if self.labels else None)


@contextmanager
def gc_paused() -> Iterator[None]:
    """Make millions of objects, none of which is rubbish yet: looking for some takes more time than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
