"""Sliding windows, the schedule: window positions, the order of tokens, and what the prior reads.

A window is centered on its token, but stays inside the grid. With windows of 3 on a side of 5::

    token         0 1 2 3 4
    window start  0 0 1 2 2     tokens 0 and 1 share a window, and so do 3 and 4

A window of `w` columns shows at most w - 1 columns further right in the row above. So a row can be sampled w columns
behind the row above it: a wavefront. The step of each token of a 3 x 5 grid, w = 2::

    row 0    0 1 2 3 4
    row 1        2 3 4 5 6          9 steps instead of 15
    row 2            4 5 6 7 8

Cached positions are not read again: above, token 0 reads the prefix, token 1 only token 0. Token 2 has another window,
and starts at the prefix.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqf.batch import Size


def window_start(position: int, window: int, length: int) -> int:
    """First position of the window around `position`, inside [0, length)."""
    return min(max(position - window // 2, 0), length - window)


def locate_in_window(cell: Size, window: Size, grid: Size) -> tuple[Size, int]:
    """Start (row, column) of a token's window, and the number of its tokens before that token."""
    top, left = (window_start(cell[i], window[i], grid[i]) for i in (0, 1))
    return (top, left), (cell[0] - top) * window[1] + cell[1] - left


def wavefront_order(grid: Size, width: int) -> Iterator[list[Size]]:
    """Yield the tokens (i, j) of each step of the wavefront, for windows of `width` columns."""
    for step in range(grid[1] + width * (grid[0] - 1)):
        rows = range(max(0, -((grid[1] - 1 - step) // width)), min(step // width + 1, grid[0]))
        yield [(i, step - i * width) for i in rows]


def raster_order(grid: Size) -> Iterator[list[Size]]:
    """Yield the tokens (i, j) row by row, one a step."""
    return ([(i, j)] for i in range(grid[0]) for j in range(grid[1]))


@dataclass(frozen=True)
class WindowChunk:
    """Positions that the prior reads for one token: `start` to `start + count` - 1 of [prefix; tokens]."""

    cell: Size  # of the token in the grid
    window_start: Size  # row and column of the window's first token
    slot: int  # of the window in the cache
    start: int
    count: int


@dataclass(frozen=True)
class DecodingStep:
    """Tokens that are sampled in one pass of the prior."""

    chunks: list[WindowChunk]  # one a token, all in different slots
    offset: int  # column of the first of them in `DecodingSchedule.to_tensor`

    @property
    def span(self) -> slice:
        return slice(self.offset, self.offset + len(self.chunks))

    @property
    def context_length(self) -> int:
        """The largest position that is read, + 1."""
        return max(chunk.start + chunk.count for chunk in self.chunks)


@dataclass
class DecodingSchedule:
    """All steps of a grid."""

    prefix_length: int
    steps: list[DecodingStep] = field(default_factory=list)
    num_slots: int = 0  # windows in the cache at once, those that a step works on included

    def to_tensor(self) -> Tensor:
        """All chunks as int64 (7, H * W): row, column, top, left, slot, start, count."""
        chunks = [chunk for step in self.steps for chunk in step.chunks]
        return torch.tensor([(*each.cell, *each.window_start, each.slot, each.start, each.count) for each in chunks]).T


class _Slots:
    def __init__(self) -> None:
        self.count, self.free = 0, list[int]()

    def take(self) -> int:
        if self.free:
            return self.free.pop()
        self.count += 1
        return self.count - 1


def make_schedule(
    order: Iterator[list[Size]], window: Size, grid: Size, prefix_length: int, max_cached: int
) -> DecodingSchedule:
    """Schedule the tokens of a grid, so that each position of a cached window is read once.

    Args:
        prefix_length: Positions before the first token of a window.
        max_cached: Windows kept between steps; others are read from the start for each token.
    """
    steps = list(order)
    remaining = Counter(locate_in_window(cell, window, grid)[0] for cells in steps for cell in cells)
    schedule, slots, offset = DecodingSchedule(prefix_length), _Slots(), 0
    cached: dict[Size, tuple[int, int]] = {}  # by start of the window: its slot, and the positions that it holds
    for cells in steps:
        chunks: list[WindowChunk] = []
        released: list[int] = []
        for cell in cells:
            corner, before = locate_in_window(cell, window, grid)
            end = prefix_length + before
            slot, start = cached.pop(corner) if corner in cached else (slots.take(), 0)
            chunks.append(WindowChunk(cell, corner, slot, start, end - start))
            remaining[corner] -= 1
            if remaining[corner] and len(cached) < max_cached:
                cached[corner] = slot, end
            else:
                released.append(slot)
        slots.free += released  # only now: chunks of one step must not share a slot
        schedule.steps.append(DecodingStep(chunks, offset))
        offset += len(cells)
    schedule.num_slots = slots.count
    return schedule
