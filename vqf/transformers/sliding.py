"""Sliding windows: a prior that has learned a small grid draws a grid of any size.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841, section 3.2 and figure 3.
Every token of an H x W grid is drawn, row by row, from the prior's view of an h x w window around it. Three ways to
get the same tokens with less work are here, each an option:

* the prior is causal, so only the part of the window before the token runs, and one row of logits is computed;
* as long as the window stands still, keys and values of that part are remembered;
* rows depend on each other only through their windows. A row may follow the one above it at a distance of w columns,
  and all rows under way are one batch: W + w (H - 1) steps in place of W H.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqf.errors import UserError
from vqf.protocols import Autoregressive, Size, pair
from vqf.registry import register
from vqf.transformers.guidance import Schedule
from vqf.transformers.sampling import Drawing, check_numbers, draw, many_uniforms, start

Prefix = Tensor | Callable[[Size, Size], Tensor]


def window_start(position: int, window: int, length: int) -> int:
    """Return where the window of a position starts: centred on it, but inside of [0, length)."""
    return min(max(position - window // 2, 0), length - window)


def waves(grid: Size, width: int) -> Iterator[list[Size]]:
    """Yield the tokens (i, j) of a grid that are drawn together, for windows of a width.

    The window of (i, j) ends in row i - 1 at column `width - 1` at least, where j = 0, and it moves by at most one
    column for each of j. So row i may be `width` columns behind row i - 1, and no closer.
    """
    for step in range(grid[1] + width * (grid[0] - 1)):
        rows = range(max(0, -((grid[1] - 1 - step) // width)), min(step // width + 1, grid[0]))
        yield [(i, step - i * width) for i in rows]


def crop(prefix: Prefix, at: Size, window: Size) -> Tensor:
    """Return the prefix (B, M) of the window that starts at (row, column).

    Args:
        prefix: (B, M), the same for every window; (B, H, W), a condition for every token of the grid, whose window
            is read row by row; or a function of start and size that gives (B, M), for everything else.
        at: Start of the window.
        window: Its height and width.
    """
    if not isinstance(prefix, Tensor):
        return prefix(at, window)
    if prefix.ndim == 2:
        return prefix
    return prefix[:, at[0] : at[0] + window[0], at[1] : at[1] + window[1]].flatten(1)


@register("sampler", "sliding_window")
class SlidingWindow(Drawing):
    """Draws a grid larger than the prior's own: each token from the window around it.

    The tokens do not depend on `prefix_only`, `cache` and `wavefront`, except where rounding decides between two
    codes: the same numbers are added in another order.

    Args:
        window: Height and width in tokens, or one number for both; by default the grid that the prior was trained on.
            With another width its learned positions mean something else.
        temperature: Below 1 sharpens the prior's distribution, above 1 flattens it.
        top_k: Draw among this many best codes; all by default.
        top_p: Draw among the best codes that together reach this probability; all by default.
        min_p: Draw among the codes at least this many times as likely as the best; all by default.
        guidance: s of classifier-free guidance, as in `autoregressive`.
        guidance_schedule: How s moves from the first token of the grid to the last.
        guidance_interval: Shares of the sample between which `interval` guides.
        guidance_power: Of `power_cosine`.
        prefix_only: Run only the part of a window before the token.
        cache: Remember keys and values while the window stands still: at the left and right border, and everywhere
            if the grid is as wide as the window. Needs an `Autoregressive` prior.
        wavefront: Draw rows side by side, in batches up to W / w times as large.
    """

    speed_options: ClassVar = {"prefix_only", "cache", "wavefront"}

    def __init__(
        self,
        *,
        window: int | Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float = 1.0,
        guidance_schedule: Schedule = "constant",
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guidance_power: float = 1.0,
        prefix_only: bool = True,
        cache: bool = True,
        wavefront: bool = True,
    ) -> None:
        super().__init__(
            temperature, top_k, top_p, min_p, guidance, guidance_schedule, guidance_interval, guidance_power
        )
        self.window = None if window is None else pair(window)
        if self.window is not None and min(self.window) < 1:
            raise ValueError(f"window must be at least 1 high and wide, not {self.window}")
        self.prefix_only, self.cache, self.wavefront = prefix_only, cache, wavefront

    @torch.no_grad()
    def __call__(
        self,
        prior: Any,
        prefix: Prefix,
        grid: Size,
        *,
        seed: int,
        first: int = 0,
        known: Tensor | None = None,
        null_prefix: Prefix | None = None,
        window: Size | None = None,
    ) -> Tensor:
        """Draw tokens (B, H * W) from a prior in eval mode.

        Args:
            prior: Gives logits; see `vqf.protocols.Prior`. One whose `begin` takes `tokens`, too, reads them at once.
            prefix: The condition: (B, M), (B, H, W) or a function of a window's start and size; see `crop`.
            grid: Height and width in tokens.
            seed: With `first + i` it decides sample i; every place of the grid has a number of its own.
            first: Index of the batch's first sample.
            known: (B, H * W) int64, tokens to keep, -1 where one is to be drawn.
            null_prefix: What says that there is no condition, in one of the forms of `prefix`; guidance needs it.
            window: The window where the option says none; the whole grid by default.

        Raises:
            UserError: If the grid is narrower than the window, the prior models fewer tokens than a window has, or
                guidance has no `null_prefix`.
        """
        self.require(null_prefix)
        size = self._fit(self.window or window or grid, grid, prior)
        prefixes = [prefix] if not self.guided or null_prefix is None else [prefix, null_prefix]
        corner = crop(prefix, (0, 0), size)
        batch, count = len(corner), grid[0] * grid[1]
        tokens = start(known, (batch, count), prior.vocab_size, corner.device).unflatten(1, grid)
        numbers = many_uniforms(seed, first, batch, count).to(corner.device).unflatten(1, grid)
        views = _Views(prior, prefixes, tokens, size, self.prefix_only, self.cache)
        every = waves(grid, size[1]) if self.wavefront else ([(i, j)] for i in range(grid[0]) for j in range(grid[1]))
        for cells in every:
            for group in views.groups(cells):
                self._draw(views, group, tokens, numbers)
        return tokens.flatten(1)

    def _draw(self, views: "_Views", cells: list[Size], tokens: Tensor, numbers: Tensor) -> None:
        """Draw the tokens (B, H, W) of some places of the grid at once."""
        batch, height, width = tokens.shape
        logits = views.logits(cells)
        if cells[0] == (0, 0):
            check_numbers(logits)
        progress = [(i * width + j) / (height * width) for i, j in cells for _ in range(batch)]
        rows, columns = (torch.tensor(each, device=tokens.device) for each in zip(*cells, strict=True))
        drawn = draw(self.filter(self.guide(logits, progress)), numbers[:, rows, columns].T.flatten())
        before = tokens[:, rows, columns]
        tokens[:, rows, columns] = torch.where(before < 0, drawn.unflatten(0, (len(cells), batch)).T, before)

    @staticmethod
    def _fit(window: Size, grid: Size, prior: Any) -> Size:
        if grid[1] < window[1]:
            raise UserError(
                f"sampler=sliding_window: a grid of {grid[0]} x {grid[1]} codes is narrower than the window of "
                f"{window[0]} x {window[1]}; draw at least {window[1]} columns"
            )
        window = (min(window[0], grid[0]), window[1])  # fewer rows are the start of a sequence
        length = getattr(prior, "length", window[0] * window[1])
        if window[0] * window[1] > length:
            raise UserError(
                f"sampler.window=[{window[0]},{window[1]}]: it has {window[0] * window[1]} tokens, the prior models "
                f"{length}"
            )
        return window


class _Views:
    """What a prior sees of one grid, window by window."""

    def __init__(
        self, prior: Any, prefixes: list[Prefix], tokens: Tensor, window: Size, prefix_only: bool, cache: bool
    ) -> None:
        self.prior, self.prefixes, self.tokens, self.window = prior, prefixes, tokens, window
        self.prefix_only = prefix_only
        self.cache = cache and isinstance(prior, Autoregressive)
        self.fluent = self.cache_takes_tokens(prior)
        self.memories: dict[Size, tuple[int, Any]] = {}  # of a window: tokens read, and what the prior remembers

    @staticmethod
    def cache_takes_tokens(prior: Any) -> bool:
        """Tell whether `begin` reads tokens after the prefix in one pass."""
        return isinstance(prior, Autoregressive) and "tokens" in inspect.signature(prior.begin).parameters

    def place(self, cell: Size) -> tuple[Size, int]:
        """Return the start of a token's window, and how many of the window's tokens come before it."""
        (i, j), (height, width) = cell, self.window
        top = window_start(i, height, self.tokens.shape[1])
        left = window_start(j, width, self.tokens.shape[2])
        return (top, left), (i - top) * width + j - left

    def stays(self, cell: Size) -> bool:
        """Tell whether the window stands still before or after this token."""
        left, last = self.place(cell)[0][1], self.tokens.shape[2] - self.window[1]
        return left in (0, last) and self.cache

    def groups(self, cells: list[Size]) -> Iterator[list[Size]]:
        """Yield tokens whose windows run as one batch: as many tokens before them, and nothing to remember."""
        groups: dict[Hashable, list[Size]] = defaultdict(list)
        for cell in cells:
            groups[cell if self.stays(cell) else self.place(cell)[1] if self.prefix_only else None].append(cell)
        yield from groups.values()

    def logits(self, cells: list[Size]) -> Tensor:
        """Return the logits of some tokens, (cells * B, V), and those without the condition after them."""
        if len(cells) == 1 and self.stays(cells[0]):
            return self._remembered(*self.place(cells[0]))
        places = [self.place(cell) for cell in cells]
        count = max(n for _, n in places) + 1 if self.prefix_only else self.window[0] * self.window[1]
        prefix = torch.cat([crop(each, at, self.window) for each in self.prefixes for at, _ in places])
        seen = torch.cat([self._seen(at, count) for at, _ in places]).repeat(len(self.prefixes), 1)
        if self.prefix_only and self.fluent:
            return self.prior.begin(prefix, seen[:, :-1])[0]
        rows = torch.tensor([n for _, n in places], device=seen.device).repeat_interleave(len(self.tokens))
        rows = rows.repeat(len(self.prefixes))
        return self.prior(seen, prefix)[torch.arange(len(rows), device=rows.device), rows]

    def _remembered(self, at: Size, n: int) -> Tensor:
        """Return the logits of token n of the window at a start; of the part before, only what is new is read."""
        seen = self._seen(at, n).repeat(len(self.prefixes), 1)
        read, cache = self.memories.get(at, (-1, None))
        if read == n - 1 and cache is not None:
            logits = self.prior.advance(seen[:, -1], cache)
        else:
            self.memories = {other: kept for other, kept in self.memories.items() if other[1] != at[1]}
            logits, cache = self._begin(torch.cat([crop(each, at, self.window) for each in self.prefixes]), seen)
        self.memories[at] = (n, cache)
        return logits

    def _begin(self, prefix: Tensor, seen: Tensor) -> tuple[Tensor, Any]:
        if self.fluent:
            return self.prior.begin(prefix, seen)
        logits, cache = self.prior.begin(prefix)
        for token in seen.unbind(1):
            logits = self.prior.advance(token, cache)
        return logits, cache

    def _seen(self, at: Size, count: int) -> Tensor:
        """Return the first tokens (B, count) of a window; 0 where none is drawn yet."""
        (top, left), (height, width) = at, self.window
        return self.tokens[:, top : top + height, left : left + width].flatten(1)[:, :count].clamp(min=0)
