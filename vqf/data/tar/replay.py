"""Random access to a stream."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator

from vqf.data.tar.remote_io import RawSample


class ReplayableStream:
    """Indexes a stream, of which it keeps samples between the last index and the farthest one read."""

    def __init__(self, begin: Callable[[], Iterator[RawSample]]) -> None:
        self.factory, self.pid = begin, os.getpid()
        self.length: int | None = None  # known once the end was reached
        self._rewind()

    def iter_from(self, index: int) -> Iterator[RawSample]:
        """Yield the samples from `index` on, which wraps around at a known end."""
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
        """Read on until the buffer holds `count` samples; False at the end."""
        while len(self.buffer) < count:
            try:
                self.buffer.append(next(self.iterator))
            except StopIteration:
                self.length = self.buffer_start + len(self.buffer)
                return False
        return True

    def _rewind(self) -> None:
        self.iterator, self.buffer, self.buffer_start = self.factory(), deque[RawSample](), 0
