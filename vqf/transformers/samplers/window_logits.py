"""What a prior is asked about the windows of a grid: whole windows, or only what it has not read of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vqf.batch import Size
from vqf.protocols import Pieces, Piecewise, Prior
from vqf.transformers.samplers.window_schedule import Plan, Wave

Prefix = Tensor | Callable[[Size, Size], Tensor]


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


class WholeWindows:
    """Passes windows through the whole of any prior.

    Args:
        prior: Gives logits of every position.
        prefixes: The condition, and what stands for none where there is guidance.
        tokens: (B, H, W) of the grid, which are drawn meanwhile; below 0 where none is drawn yet.
        window: Height and width.
        plan: In which nothing is kept.
        all_of_it: Whether the part behind the last token of a wave runs, too.
    """

    def __init__(
        self, prior: Prior, prefixes: Sequence[Prefix], tokens: Tensor, window: Size, plan: Plan, all_of_it: bool
    ) -> None:
        self.prior, self.prefixes, self.tokens, self.window, self.plan = prior, prefixes, tokens, window, plan
        self.all_of_it = all_of_it
        self.table = plan.table().to(tokens.device)
        self.places = torch.arange(window[0] * window[1], device=tokens.device)

    def logits(self, wave: Wave) -> Tensor:
        """Return the logits of the tokens of a wave (cells * B, V), and those without the condition after them."""
        windows, (batch, copies) = [each.window for each in wave.readings], (len(self.tokens), len(self.prefixes))
        prefix = torch.cat([crop(each, at, self.window) for each in self.prefixes for at in windows])
        places = self.places if self.all_of_it else self.places[: wave.reach - prefix.shape[1] + 1]
        _, _, top, left, _, _, count = self.table[:, wave.span, None]
        rows, columns = top + places // self.window[1], left + places % self.window[1]
        seen = self.tokens[:, rows, columns].transpose(0, 1).flatten(0, 1).clamp(min=0)
        last = (count - prefix.shape[1]).expand(-1, batch).flatten().repeat(copies)
        logits = self.prior(seen.repeat(copies, 1), prefix)
        return logits.take_along_dim(last[:, None, None], dim=1)[:, 0]


class UnreadPieces:
    """Lets a prior read, of every window, only what its cache does not hold yet.

    Args:
        prior: Reads pieces of many sequences at once.
        prefixes: The condition, and what stands for none where there is guidance.
        tokens: (B, H, W) of the grid, which are drawn meanwhile.
        window: Height and width.
        plan: Says what is read, and where its keys and values stay.
    """

    def __init__(self, prior: Piecewise, prefixes: Sequence[Prefix], tokens: Tensor, window: Size, plan: Plan) -> None:
        self.prior, self.prefixes, self.tokens, self.window, self.plan = prior, prefixes, tokens, window, plan
        self.table = plan.table().to(tokens.device)
        self.rows = torch.arange(len(prefixes) * len(tokens), device=tokens.device).view(len(prefixes), 1, len(tokens))
        self.cache = prior.room(plan.slots * self.rows.numel())

    def logits(self, wave: Wave) -> Tensor:
        """Return the logits of the tokens of a wave (cells * B, V), and those without the condition after them."""
        shape = (len(self.prefixes), len(wave.readings), len(self.tokens))
        top, left, slot, start, count = (
            each[None, :, None].expand(shape).flatten() for each in self.table[2:, wave.span]
        )
        total, ends = sum(each.count for each in wave.readings) * self.rows.numel(), count.cumsum(0)
        numbers, rows = torch.arange(total, device=top.device), self.rows.expand(shape).flatten()
        owners = numbers[: len(rows)].repeat_interleave(count, output_size=total)
        positions = numbers + (start + count - ends)[owners]
        after = (positions - self.plan.prefix_length).clamp(min=0)
        places = (top[owners] + after // self.window[1], left[owners] + after % self.window[1])
        ids = self.tokens[rows[owners] % len(self.tokens), *places].clamp(min=0)
        ids = self._with_prefix(wave, ids, owners, positions)
        slots = slot * self.rows.numel() + rows
        longest = max(each.count for each in wave.readings)
        return self.prior.extend(Pieces(ids, positions, owners, ends - 1, slots, longest, wave.reach), self.cache)

    def _with_prefix(self, wave: Wave, ids: Tensor, owners: Tensor, positions: Tensor) -> Tensor:
        """Return the ids with those of the prefix, of the windows that are begun."""
        begun = [each.start == 0 for each in wave.readings]
        if not any(begun):
            return ids
        blank = ids.new_zeros(len(self.tokens), self.plan.prefix_length)
        prefix = torch.cat([
            crop(prefix, each.window, self.window) if each.start == 0 else blank
            for prefix in self.prefixes
            for each in wave.readings
        ])  # fmt: skip
        before = positions < self.plan.prefix_length
        return torch.where(before, prefix[owners, positions.clamp(max=self.plan.prefix_length - 1)], ids)
