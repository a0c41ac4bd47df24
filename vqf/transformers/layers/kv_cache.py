"""Key-value caches of causal transformers over [prefix; tokens], one a layer.

* `KVCache` holds sequences that advance together, by one token at a time: `sampler=autoregressive`.
* `SlotKVCache` holds sequences in slots, that advance by chunks: `sampler=sliding_window`, a sequence for each window.

Only attention pads chunks. Three positions of the sequence in slot 5 and one of the sequence in slot 4::

    positions           0 1 2 7
    chunk_indices       0 0 0 1
    offsets             0 1 2 0
    queries, padded     [0 1 2]    keys, from the cache    [0 1 2 - - - - -]    -: masked
                        [7 - -]                            [0 1 2 3 4 5 6 7]
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.protocols import RaggedChunks

# How a block attends: queries, keys and values (B, heads, T, d), and the dropout rate, to (B, heads, T, d).
AttentionFn = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass
class FullAttention:
    """Attention without a cache, causal or by a mask (T, T)."""

    mask: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        causal = self.mask is None and q.shape[2] > 1  # one query is the newest position, which sees all keys
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=dropout, is_causal=causal)


class KVCache:
    """Keys and values of one layer, (B, heads, capacity, d), for sequences that advance together.

    The first call reads the prefix, every later call one token.
    """

    def __init__(self, capacity: int, prefill_attention: FullAttention) -> None:
        self.capacity, self.prefill_attention, self.length = capacity, prefill_attention, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        assert self.length == 0 or q.shape[2] == 1, "the cache grows by one token at a time"
        attend = FullAttention() if self.length else self.prefill_attention
        return attend(q, *self._append(k, v), dropout)

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            # Allocated at the first call, when autocast has chosen the dtype. Empty: only written positions are read.
            batch, heads, _, dim = keys.shape
            self.keys, self.values = keys.new_empty(2, batch, heads, self.capacity, dim)
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


@dataclass
class DecodingState:
    """The caches of all layers, and their number of positions."""

    kv_caches: list[KVCache]
    position: int


@dataclass
class RaggedLayout:
    """Indices and mask by which attention pads chunks."""

    chunks: RaggedChunks
    slots: Tensor  # (T,) int64: the slot of each position's sequence
    offsets: Tensor  # (T,) int64: index of each position in its chunk
    mask: Tensor  # (n, 1, max_chunk_length, context_length): whether a query sees a key

    @classmethod
    def from_chunks(cls, chunks: RaggedChunks, bidirectional_prefix: int) -> "RaggedLayout":
        """Lay out chunks; the first `bidirectional_prefix` positions all see each other."""
        starts = torch.cat((chunks.ends.new_zeros(1), chunks.ends[:-1] + 1))
        count = torch.arange(max(len(chunks.ids), chunks.context_length), device=chunks.ids.device)
        queries = (chunks.positions[starts, None] + count[: chunks.max_chunk_length])[:, :, None]
        keys = count[: chunks.context_length]
        mask = keys <= queries
        if bidirectional_prefix > 1:
            mask |= (keys < bidirectional_prefix) & (queries < bidirectional_prefix)
        offsets = count[: len(chunks.ids)] - starts[chunks.chunk_indices]
        return cls(chunks, chunks.slots[chunks.chunk_indices], offsets, mask[:, None])


class SlotKVCache:
    """Keys and values of one layer, (num_sequences, capacity, heads, d), for sequences that advance by chunks."""

    def __init__(self, num_sequences: int, capacity: int) -> None:
        self.num_sequences, self.capacity = num_sequences, capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(self, layout: RaggedLayout, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Store keys and values of chunks (1, heads, T, d), and attend to their sequences."""
        chunks = layout.chunks
        queries, keys, values = (each[0].transpose(0, 1) for each in (q, k, v))  # (T, heads, d)
        self._store(layout.slots, chunks.positions, keys, values)
        padded = queries.new_zeros(len(chunks.slots), chunks.max_chunk_length, *queries.shape[1:])
        padded[chunks.chunk_indices, layout.offsets] = queries
        k, v = self._contexts(chunks)
        y = F.scaled_dot_product_attention(padded.transpose(1, 2), k, v, attn_mask=layout.mask, dropout_p=dropout)
        return y.transpose(1, 2)[chunks.chunk_indices, layout.offsets].transpose(0, 1)[None]

    def _store(self, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        if self.keys is None or self.values is None:
            # Zeros: attention multiplies masked values by 0, and 0 times NaN of uninitialized memory is NaN.
            self.keys, self.values = keys.new_zeros(2, self.num_sequences, self.capacity, *keys.shape[1:])
        self.keys[slots, positions] = keys
        self.values[slots, positions] = values

    def _contexts(self, chunks: RaggedChunks) -> Iterator[Tensor]:
        assert self.keys is not None and self.values is not None, "keys are stored before they are read"
        return (each[chunks.slots, : chunks.context_length].transpose(1, 2) for each in (self.keys, self.values))
