"""Sliding windows, the logits: what the prior reads of the windows of one step.

Sequences are ordered as (prefix, token of the step, sample), so that with guidance conditional logits come first.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from vqf.batch import Size
from vqf.protocols import Causal, RaggedChunks, RaggedDecoding, WindowPrefix
from vqf.tokens.prefix import Prefix
from vqf.transformers.samplers.window_schedule import DecodingSchedule, DecodingStep, WindowChunk

WindowPrefixes = WindowPrefix | Prefix | Tensor  # see `crop_prefix`


def crop_prefix(prefix: WindowPrefixes, start: Size, window: Size) -> Prefix:
    """The prefix of the window that starts at (row, column).

    Args:
        prefix: A `Prefix` or ids (B, M), for every window; ids (B, H, W), to be cropped; or a function of a window's
            start and size.
    """
    if isinstance(prefix, Prefix):
        return prefix
    if not isinstance(prefix, Tensor):
        return Prefix.of(prefix(start, window))
    if prefix.ndim == 3:
        prefix = prefix[:, start[0] : start[0] + window[0], start[1] : start[1] + window[1]].flatten(1)
    return Prefix(prefix)


class RecomputedWindows:
    """Logits by any causal prior, which reads every window from its start to the new token.

    Args:
        tokens: (B, H, W), filled by the sampler between steps, else -1.
        schedule: Made with `max_cached=0`.
    """

    def __init__(
        self,
        prior: Causal,
        prefixes: Sequence[WindowPrefixes],
        tokens: Tensor,
        window: Size,
        schedule: DecodingSchedule,
    ) -> None:
        self.prior, self.prefixes, self.tokens, self.window, self.schedule = prior, prefixes, tokens, window, schedule
        self.table = schedule.to_tensor().to(tokens.device)
        self.window_indices = torch.arange(window[0] * window[1], device=tokens.device)

    def logits(self, step: DecodingStep) -> Tensor:
        """Logits (cells * B, V) of the tokens of a step; with guidance (2 * cells * B, V)."""
        by_count: dict[int, list[int]] = defaultdict(list)  # a prior is never shown tokens after the new one
        for i, chunk in enumerate(step.chunks):
            by_count[chunk.count].append(i)
        order = torch.tensor([i for cells in by_count.values() for i in cells], device=self.tokens.device)
        logits = [self._same_length([step.chunks[i] for i in cells]) for cells in by_count.values()]
        return torch.cat(logits, dim=1)[:, order.argsort()].flatten(0, 2)

    def _same_length(self, chunks: Sequence[WindowChunk]) -> Tensor:
        """Logits (copies, cells, B, V) of windows with equally many tokens before the new one."""
        prefix = Prefix.cat([
            crop_prefix(each, chunk.window_start, self.window) for each in self.prefixes for chunk in chunks
        ])  # fmt: skip
        indices = self.window_indices[: chunks[0].count - prefix.ids.shape[1] + 1]  # the last is predicted, not read
        corners = torch.tensor([chunk.window_start for chunk in chunks], device=self.tokens.device)[:, :, None]
        rows, columns = corners[:, 0] + indices // self.window[1], corners[:, 1] + indices % self.window[1]
        tokens = self.tokens[:, rows, columns].transpose(0, 1).flatten(0, 1).repeat(len(self.prefixes), 1)
        return self.prior(tokens, prefix)[:, -1].unflatten(0, (len(self.prefixes), len(chunks), len(self.tokens)))


class CachedWindows:
    """Logits with a cache: the prior reads only the positions of a window that it has not read."""

    def __init__(
        self,
        prior: RaggedDecoding,
        prefixes: Sequence[WindowPrefixes],
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
            crop_prefix(prefix, chunk.window_start, self.window).ids if chunk.start == 0 else unused
            for prefix in self.prefixes
            for chunk in step.chunks
        ])  # fmt: skip
        in_prefix = positions < self.schedule.prefix_length
        return torch.where(in_prefix, prefix[chunk_indices, positions.clamp(max=self.schedule.prefix_length - 1)], ids)
