"""Sliding windows, the schedule: window positions, the order of tokens, and what the prior reads at each step.

A schedule follows from sizes alone. It is computed before the first token, and copied to the device as one tensor.

Window positions. A window is centered on its token, but stays inside the grid. With windows of 3 on a side of 5::

    token         0 1 2 3 4
    window start  0 0 1 2 2     tokens 0 and 1 share a window, and so do 3 and 4

Order. A window of `w` columns shows tokens of the row above that are at most w - 1 columns further right. So a row
can be sampled w columns behind the row above it, before that one is finished: a wavefront. The step of each token of
a 3 x 5 grid, w = 2::

    row 0    0 1 2 3 4
    row 1        2 3 4 5 6          9 steps instead of 15
    row 2            4 5 6 7 8

Reads. Positions [prefix; tokens] of a window whose keys and values are in the cache are not read again. Tokens 0 and 1
above, in the same window: token 0 reads the prefix, token 1 reads only token 0. Token 2 has another window, in which
every token has another position: it starts at the prefix again.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqf.batch import Size


def window_start(position: int, window: int, length: int) -> int:
    """First position of the window that is centered on `position`, moved into [0, length)."""
    return min(max(position - window // 2, 0), length - window)


def locate_in_window(cell: Size, window: Size, grid: Size) -> tuple[Size, int]:
    """Start (row, column) of a token's window, and the number of tokens before it in the window."""
    top, left = (window_start(cell[i], window[i], grid[i]) for i in (0, 1))
    return (top, left), (cell[0] - top) * window[1] + cell[1] - left


def wavefront_order(grid: Size, width: int) -> Iterator[list[Size]]:
    """Yield the tokens (i, j) of each step of the wavefront, for windows of `width` columns.

    Row i is `width` columns behind row i - 1, and cannot be closer: at j = 0 its window shows columns 0 to `width` - 1
    of row i - 1, and with each j it moves right by at most one column.
    """
    for step in range(grid[1] + width * (grid[0] - 1)):
        rows = range(max(0, -((grid[1] - 1 - step) // width)), min(step // width + 1, grid[0]))
        yield [(i, step - i * width) for i in rows]


def raster_order(grid: Size) -> Iterator[list[Size]]:
    """Yield the tokens (i, j) of a grid row by row, one a step."""
    return ([(i, j)] for i in range(grid[0]) for j in range(grid[1]))


@dataclass(frozen=True)
class WindowChunk:
    """What the prior reads for one token: positions `start` to `start + count` - 1 of its window's [prefix; tokens]."""

    cell: Size  # of the token in the grid
    window_start: Size  # row and column of the window's first token
    slot: int  # of the window in the cache
    start: int
    count: int


@dataclass(frozen=True)
class DecodingStep:
    """Tokens that are sampled together, in one pass of the prior."""

    chunks: list[WindowChunk]  # one a token, all in different slots
    offset: int  # column of the first of them in `DecodingSchedule.to_tensor`

    @property
    def span(self) -> slice:
        """Columns of the step in `DecodingSchedule.to_tensor`."""
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
        """All chunks as int64 (7, H * W), in the order of the steps: row, column, top, left, slot, start, count."""
        chunks = [chunk for step in self.steps for chunk in step.chunks]
        return torch.tensor([(*each.cell, *each.window_start, each.slot, each.start, each.count) for each in chunks]).T


class _Slots:
    """Numbers of cache slots; a free one is used again before there is a new one."""

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
    """Schedule the tokens of a grid.

    Tokens share a window at the borders: neighbors at the left and right one, all rows at the upper and lower one. A
    window stays in the cache until its last token, so that each of its positions is read once.

    Args:
        order: The tokens of each step.
        window: Height and width of a window.
        grid: Height and width of the grid.
        prefix_length: Positions before the first token of a window.
        max_cached: Windows kept between steps. A window beyond it is read from its start for each of its tokens.
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
