"""What a prior is asked about the windows of a grid: whole windows, or only what it has not read of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vqf.batch import Size
from vqf.protocols import Prior, RaggedChunks, RaggedDecoding
from vqf.transformers.samplers.window_schedule import DecodingSchedule, WavefrontStep

WindowPrefix = Tensor | Callable[[Size, Size], Tensor]


def crop_prefix(prefix: WindowPrefix, start: Size, window: Size) -> Tensor:
    """Return the prefix (B, M) of the window that starts at (row, column).

    Args:
        prefix: (B, M), the same for every window; (B, H, W), a condition for every token of the grid, whose window
            is read row by row; or a function of start and size that gives (B, M), for everything else.
        start: Start of the window.
        window: Its height and width.
    """
    if not isinstance(prefix, Tensor):
        return prefix(start, window)
    if prefix.ndim == 2:
        return prefix
    return prefix[:, start[0] : start[0] + window[0], start[1] : start[1] + window[1]].flatten(1)


class RecomputedWindows:
    """Passes windows through the whole of any prior.

    Args:
        prior: Gives logits of every position.
        prefixes: The condition, and what stands for none where there is guidance.
        tokens: (B, H, W) of the grid, which are drawn meanwhile; below 0 where none is drawn yet.
        window: Height and width.
        schedule: In which nothing is kept.
        full_window: Whether the part behind the last token of a wave runs, too.
    """

    def __init__(
        self,
        prior: Prior,
        prefixes: Sequence[WindowPrefix],
        tokens: Tensor,
        window: Size,
        schedule: DecodingSchedule,
        full_window: bool,
    ) -> None:
        self.prior, self.prefixes, self.tokens, self.window, self.schedule = prior, prefixes, tokens, window, schedule
        self.full_window = full_window
        self.table = schedule.to_tensor().to(tokens.device)
        self.positions = torch.arange(window[0] * window[1], device=tokens.device)

    def logits(self, step: WavefrontStep) -> Tensor:
        """Return the logits of the tokens of a wave (cells * B, V), and those without the condition after them."""
        windows, (batch, copies) = [each.window_start for each in step.reads], (len(self.tokens), len(self.prefixes))
        prefix = torch.cat([crop_prefix(each, at, self.window) for each in self.prefixes for at in windows])
        places = self.positions if self.full_window else self.positions[: step.context_length - prefix.shape[1] + 1]
        _, _, top, left, _, _, count = self.table[:, step.span, None]
        rows, columns = top + places // self.window[1], left + places % self.window[1]
        seen = self.tokens[:, rows, columns].transpose(0, 1).flatten(0, 1).clamp(min=0)
        last = (count - prefix.shape[1]).expand(-1, batch).flatten().repeat(copies)
        logits = self.prior(seen.repeat(copies, 1), prefix)
        return logits.take_along_dim(last[:, None, None], dim=1)[:, 0]


class CachedWindows:
    """Lets a prior read, of every window, only what its cache does not hold yet.

    Args:
        prior: Reads pieces of many sequences at once.
        prefixes: The condition, and what stands for none where there is guidance.
        tokens: (B, H, W) of the grid, which are drawn meanwhile.
        window: Height and width.
        schedule: Says what is read, and where its keys and values stay.
    """

    def __init__(
        self,
        prior: RaggedDecoding,
        prefixes: Sequence[WindowPrefix],
        tokens: Tensor,
        window: Size,
        schedule: DecodingSchedule,
    ) -> None:
        self.prior, self.prefixes, self.tokens, self.window, self.schedule = prior, prefixes, tokens, window, schedule
        self.table = schedule.to_tensor().to(tokens.device)
        self.batch_rows = torch.arange(len(prefixes) * len(tokens), device=tokens.device).view(
            len(prefixes), 1, len(tokens)
        )
        self.cache = prior.allocate_cache(schedule.num_slots * self.batch_rows.numel())

    def logits(self, step: WavefrontStep) -> Tensor:
        """Return the logits of the tokens of a wave (cells * B, V), and those without the condition after them."""
        shape = (len(self.prefixes), len(step.reads), len(self.tokens))
        top, left, slot, start, count = (
            each[None, :, None].expand(shape).flatten() for each in self.table[2:, step.span]
        )
        total, ends = sum(each.count for each in step.reads) * self.batch_rows.numel(), count.cumsum(0)
        numbers, rows = torch.arange(total, device=top.device), self.batch_rows.expand(shape).flatten()
        owners = numbers[: len(rows)].repeat_interleave(count, output_size=total)
        positions = numbers + (start + count - ends)[owners]
        after = (positions - self.schedule.prefix_length).clamp(min=0)
        places = (top[owners] + after // self.window[1], left[owners] + after % self.window[1])
        ids = self.tokens[rows[owners] % len(self.tokens), *places].clamp(min=0)
        ids = self._insert_prefix(step, ids, owners, positions)
        slots = slot * self.batch_rows.numel() + rows
        longest = max(each.count for each in step.reads)
        return self.prior.decode_chunks(
            RaggedChunks(ids, positions, owners, ends - 1, slots, longest, step.context_length), self.cache
        )

    def _insert_prefix(self, step: WavefrontStep, ids: Tensor, chunk_indices: Tensor, positions: Tensor) -> Tensor:
        """Return the ids with those of the prefix, of the windows that are begun."""
        begun = [each.start == 0 for each in step.reads]
        if not any(begun):
            return ids
        blank = ids.new_zeros(len(self.tokens), self.schedule.prefix_length)
        prefix = torch.cat([
            crop_prefix(prefix, each.window_start, self.window) if each.start == 0 else blank
            for prefix in self.prefixes
            for each in step.reads
        ])  # fmt: skip
        before = positions < self.schedule.prefix_length
        return torch.where(before, prefix[chunk_indices, positions.clamp(max=self.schedule.prefix_length - 1)], ids)
