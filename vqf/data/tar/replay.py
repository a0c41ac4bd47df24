"""Going through something that can only be read from its beginning, by numbers."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class RawSample:
    """An image as it comes, not yet decoded."""

    name: str
    content: bytes
    label: bytes | None
    map_name: str = ""  # empty where it has no map
    map_content: bytes = b""


class ReplayableStream:
    """Something that can be read from its beginning alone, remembered only as far ahead as somebody has looked."""

    def __init__(self, begin: Callable[[], Iterator[RawSample]]) -> None:
        self.factory, self.pid = begin, os.getpid()
        self.length: int | None = None  # known once it was read to its end
        self._rewind()

    def iter_from(self, index: int) -> Iterator[RawSample]:
        """Yield what comes from a place on, to the end; places beyond the end begin again."""
        index = index % self.length if self.length else index
        if index < self.buffer_start:
            self._rewind()
        while self.buffer_start < index and self._fill_buffer(1):
            self.buffer.popleft()
            self.buffer_start += 1
        if self.buffer_start < index:
            return
        for i in itertools.count():
            if not self._fill_buffer(i + 1):
                return
            yield self.buffer[i]

    def _fill_buffer(self, count: int) -> bool:
        """Look so many ahead, if there are."""
        while len(self.buffer) < count:
            try:
                self.buffer.append(next(self.iterator))
            except StopIteration:
                self.length = self.buffer_start + len(self.buffer)
                return False
        return True

    def _rewind(self) -> None:
        self.iterator, self.buffer, self.buffer_start = self.factory(), deque[RawSample](), 0
