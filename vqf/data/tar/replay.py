"""Going through something that can only be read from its beginning, by numbers."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Raw:
    """A picture as it comes, not yet decoded."""

    name: str
    content: bytes
    label: bytes | None
    map_name: str = ""  # empty where it has no map
    map: bytes = b""


class Tape:
    """Something that can be read from its beginning alone, remembered only as far ahead as somebody has looked."""

    def __init__(self, begin: Callable[[], Iterator[Raw]]) -> None:
        self.begin, self.process = begin, os.getpid()
        self.length: int | None = None  # known once it was read to its end
        self._rewind()

    def since(self, index: int) -> Iterator[Raw]:
        """Yield what comes from a place on, to the end; places beyond the end begin again."""
        index = index % self.length if self.length else index
        if index < self.first:
            self._rewind()
        while self.first < index and self._more(1):
            self.ahead.popleft()
            self.first += 1
        if self.first < index:
            return
        for i in itertools.count():
            if not self._more(i + 1):
                return
            yield self.ahead[i]

    def _more(self, count: int) -> bool:
        """Look so many ahead, if there are."""
        while len(self.ahead) < count:
            try:
                self.ahead.append(next(self.source))
            except StopIteration:
                self.length = self.first + len(self.ahead)
                return False
        return True

    def _rewind(self) -> None:
        self.source, self.ahead, self.first = self.begin(), deque[Raw](), 0
