"""Sliding windows, the logits: what the prior reads of the windows of one step.

Sequences are ordered as (prefix, token of the step, sample), so that with guidance conditional logits come first.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vqf.batch import Size
from vqf.protocols import Prior, RaggedChunks, RaggedDecoding
from vqf.transformers.samplers.window_schedule import DecodingSchedule, DecodingStep

WindowPrefix = Tensor | Callable[[Size, Size], Tensor]  # see `crop_prefix`


def crop_prefix(prefix: WindowPrefix, start: Size, window: Size) -> Tensor:
    """The prefix (B, M) of the window that starts at (row, column).

    Args:
        prefix: (B, M), for every window; or (B, H, W), to be cropped; or a function of a window's start and size.
    """
    if not isinstance(prefix, Tensor):
        return prefix(start, window)
    if prefix.ndim == 2:
        return prefix
    return prefix[:, start[0] : start[0] + window[0], start[1] : start[1] + window[1]].flatten(1)


class RecomputedWindows:
    """Logits by any prior, which reads every window from its start.

    Args:
        tokens: (B, H, W), filled by the sampler between steps, else -1.
        schedule: Made with `max_cached=0`.
        full_window: Whether the prior also reads later tokens.
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
        self.window_indices = torch.arange(window[0] * window[1], device=tokens.device)

    def logits(self, step: DecodingStep) -> Tensor:
        """Logits (cells * B, V) of the tokens of a step; with guidance (2 * cells * B, V)."""
        batch, copies = len(self.tokens), len(self.prefixes)
        prefix = torch.cat([
            crop_prefix(each, chunk.window_start, self.window) for each in self.prefixes for chunk in step.chunks
        ])  # fmt: skip
        prefix_length = prefix.shape[1]
        indices = self.window_indices
        if not self.full_window:
            indices = indices[: step.context_length - prefix_length + 1]  # the last one is predicted, not read
        _, _, top, left, _, _, count = self.table[:, step.span, None]
        rows, columns = top + indices // self.window[1], left + indices % self.window[1]
        # Tokens that are not sampled yet are shown as 0: a causal prior does not see them.
        windows = self.tokens[:, rows, columns].transpose(0, 1).flatten(0, 1).clamp(min=0)
        index_in_window = (count - prefix_length).expand(-1, batch).flatten().repeat(copies)
        logits = self.prior(windows.repeat(copies, 1), prefix)
        return logits.take_along_dim(index_in_window[:, None, None], dim=1)[:, 0]


class CachedWindows:
    """Logits with a cache: the prior reads only the positions of a window that it has not read."""

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
        copies, batch = len(prefixes), len(tokens)
        # A slot of the schedule is one of the cache for each prefix and sample; this numbers them.
        self.sequences = torch.arange(copies * batch, device=tokens.device).view(copies, 1, batch)
        self.cache = prior.allocate_cache(schedule.num_slots * copies * batch)

    def logits(self, step: DecodingStep) -> Tensor:
        return self.prior.decode_chunks(self._ragged_chunks(step), self.cache)

    def _ragged_chunks(self, step: DecodingStep) -> RaggedChunks:
        shape = (len(self.prefixes), len(step.chunks), len(self.tokens))
        top, left, slot, start, count = (
            row[None, :, None].expand(shape).flatten() for row in self.table[2:, step.span]
        )
        sequence = self.sequences.expand(shape).flatten()
        # From the schedule, not from `count`: the host would have to wait for the device.
        total = sum(chunk.count for chunk in step.chunks) * self.sequences.numel()
        index, ends = torch.arange(total, device=top.device), count.cumsum(0)
        chunk_indices = index[: len(sequence)].repeat_interleave(count, output_size=total)
        positions = index + (start + count - ends)[chunk_indices]
        in_window = (positions - self.schedule.prefix_length).clamp(min=0)
        rows, columns = (
            top[chunk_indices] + in_window // self.window[1],
            left[chunk_indices] + in_window % self.window[1],
        )
        samples = sequence[chunk_indices] % len(self.tokens)
        ids = self._insert_prefix(step, self.tokens[samples, rows, columns].clamp(min=0), chunk_indices, positions)
        return RaggedChunks(
            ids=ids,
            positions=positions,
            chunk_indices=chunk_indices,
            ends=ends - 1,
            slots=slot * self.sequences.numel() + sequence,
            max_chunk_length=max(chunk.count for chunk in step.chunks),
            context_length=step.context_length,
        )

    def _insert_prefix(self, step: DecodingStep, ids: Tensor, chunk_indices: Tensor, positions: Tensor) -> Tensor:
        if all(chunk.start > 0 for chunk in step.chunks):
            return ids
        unused = ids.new_zeros(len(self.tokens), self.schedule.prefix_length)
        prefix = torch.cat([
            crop_prefix(prefix, chunk.window_start, self.window) if chunk.start == 0 else unused
            for prefix in self.prefixes
            for chunk in step.chunks
        ])  # fmt: skip
        in_prefix = positions < self.schedule.prefix_length
        return torch.where(in_prefix, prefix[chunk_indices, positions.clamp(max=self.schedule.prefix_length - 1)], ids)
