"""Where the windows of a sliding window stand, in which order tokens are drawn, and what of each window is read when.

All of it follows from the sizes alone: it is planned before the first token, and what a device needs of it is one
tensor.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqf.batch import Size


def window_start(position: int, window: int, length: int) -> int:
    """Return where the window of a position starts: centred on it, but inside of [0, length)."""
    return min(max(position - window // 2, 0), length - window)


def locate_in_window(cell: Size, window: Size, grid: Size) -> tuple[Size, int]:
    """Return the start of a token's window, and how many of the window's tokens come before it."""
    top, left = (window_start(cell[i], window[i], grid[i]) for i in (0, 1))
    return (top, left), (cell[0] - top) * window[1] + cell[1] - left


def wavefront_order(grid: Size, width: int) -> Iterator[list[Size]]:
    """Yield the tokens (i, j) of a grid that are drawn together, for windows of a width.

    The window of (i, j) ends in row i - 1 at column `width - 1` at least, where j = 0, and it moves by at most one
    column for each of j. So row i may be `width` columns behind row i - 1, and no closer.
    """
    for step in range(grid[1] + width * (grid[0] - 1)):
        rows = range(max(0, -((grid[1] - 1 - step) // width)), min(step // width + 1, grid[0]))
        yield [(i, step - i * width) for i in rows]


def raster_order(grid: Size) -> Iterator[list[Size]]:
    """Yield the tokens (i, j) of a grid, row by row."""
    return ([(i, j)] for i in range(grid[0]) for j in range(grid[1]))


@dataclass(frozen=True)
class WindowRead:
    """What is read to draw a token: positions `start` to `start + count` - 1 of its window's [prefix; tokens]."""

    cell: Size
    window_start: Size  # its start
    slot: int  # where the window's keys and values are
    start: int
    count: int


@dataclass(frozen=True)
class WavefrontStep:
    """Tokens that are drawn together."""

    reads: list[WindowRead]
    offset: int  # place of the first of them in the plan's table

    @property
    def span(self) -> slice:
        """Where they are in the plan's table."""
        return slice(self.offset, self.offset + len(self.reads))

    @property
    def context_length(self) -> int:
        """One more than the largest position that is read."""
        return max(each.start + each.count for each in self.reads)


@dataclass
class DecodingSchedule:
    """All waves of a grid."""

    prefix_length: int
    steps: list[WavefrontStep] = field(default_factory=list)
    num_slots: int = 0  # windows that are remembered at once, those of a wave included

    def to_tensor(self) -> Tensor:
        """Return row, column, top, left, slot, start and count of every reading, (7, H * W)."""
        every = [each for wave in self.steps for each in wave.reads]
        return torch.tensor([(*each.cell, *each.window_start, each.slot, each.start, each.count) for each in every]).T


def make_schedule(
    order: Iterator[list[Size]], window: Size, grid: Size, prefix_length: int, max_cached: int
) -> DecodingSchedule:
    """Plan what is read for the tokens of a grid.

    The windows of many tokens stand at the same place: at the left and right border those of neighbours, at the upper
    and lower border those of all rows there. What such a window has read is kept until its last token, so every
    position of it is read once.

    Args:
        order: The tokens that are drawn together, one group after the other.
        window: Height and width of a window.
        grid: Height and width of the grid.
        prefix_length: Positions before the first token of a window.
        max_cached: No more windows than this are kept; any other is read anew for each of its tokens.
    """
    cells = list(order)
    left = Counter(locate_in_window(cell, window, grid)[0] for group in cells for cell in group)
    plan, free, kept = DecodingSchedule(prefix_length), list[int](), dict[Size, tuple[int, int]]()
    done = 0
    for group in cells:
        readings, released = [], []
        for cell in group:
            at, before = locate_in_window(cell, window, grid)
            end = prefix_length + before
            slot, start = kept.pop(at, (-1, 0))
            if slot < 0:
                slot = free.pop() if free else plan.num_slots
                plan.num_slots = max(plan.num_slots, slot + 1)
            readings.append(WindowRead(cell, at, slot, start, end - start))
            left[at] -= 1
            if left[at] and len(kept) < max_cached:
                kept[at] = slot, end
            else:
                released.append(slot)
        free += released
        plan.steps.append(WavefrontStep(readings, done))
        done += len(group)
    return plan
