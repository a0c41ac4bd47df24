"""What causal transformers over [prefix; tokens] share: the loss, and keys and values that are computed once.

Two ways to remember. A `KVCache` holds sequences that are read side by side, a token at a time: what the sampler
`autoregressive` needs. A `SlotKVCache` holds many sequences that are read in pieces, each of its own length: what
sliding windows need. Pieces run end to end through all that looks at single tokens, without padding; only attention
sets them side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.protocols import RaggedChunks

AttentionFn = Callable[
    [Tensor, Tensor, Tensor, float], Tensor
]  # queries, keys, values (B, heads, T, d), dropout -> same


@dataclass
class FullAttention:
    """Attention within whole sequences; causal where no mask (T, T) of visible positions is given."""

    mask: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Return (B, heads, T, d)."""
        causal = self.mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=dropout, is_causal=causal)


class KVCache:
    """Keys and values of one layer, allocated once for the whole sequence.

    Args:
        capacity: Positions of a sequence.
        prefill_attention: How what is read at first sees itself. Later it grows by one token at a time, which sees all.
    """

    def __init__(self, capacity: int, prefill_attention: FullAttention) -> None:
        self.capacity, self.prefill_attention, self.length = capacity, prefill_attention, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Remember keys and values, and attend to all that is remembered."""
        assert self.length == 0 or q.shape[2] == 1, "a memory grows by one token at a time"
        attend = FullAttention() if self.length else self.prefill_attention
        return attend(q, *self._append(k, v), dropout)

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            # Allocated here, where autocast has already chosen the dtype.
            batch, heads, _, dim = keys.shape
            self.keys, self.values = keys.new_empty(2, batch, heads, self.capacity, dim)
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


@dataclass
class DecodingState:
    """What a prior remembers of sequences side by side: one memory for each layer, and how many tokens they hold."""

    kv_caches: list[KVCache]
    position: int


@dataclass
class RaggedLayout:
    """Where the tokens of pieces stand, in one piece and in the cache: the same in every layer."""

    chunks: RaggedChunks
    slots: Tensor  # (T,) that of each token
    offsets: Tensor  # (T,) of each token in its piece
    mask: Tensor  # (n, 1, longest, reach): what a token of a piece sees of its sequence

    @classmethod
    def from_chunks(cls, chunks: RaggedChunks, bidirectional_prefix: int) -> "RaggedLayout":
        """Lay out pieces of sequences whose first positions, `bidirectional_prefix` of them, see each other."""
        firsts = torch.cat((chunks.ends.new_zeros(1), chunks.ends[:-1] + 1))
        count = torch.arange(max(len(chunks.ids), chunks.context_length), device=chunks.ids.device)
        here = (chunks.positions[firsts, None] + count[: chunks.max_chunk_length])[:, :, None]
        there = count[: chunks.context_length]
        mask = there <= here
        if bidirectional_prefix > 1:
            mask |= (there < bidirectional_prefix) & (here < bidirectional_prefix)
        offsets = count[: len(chunks.ids)] - firsts[chunks.chunk_indices]
        return cls(chunks, chunks.slots[chunks.chunk_indices], offsets, mask[:, None])


class SlotKVCache:
    """Keys and values of one layer, for many sequences.

    Args:
        num_sequences: How many.
        capacity: Positions of each.
    """

    def __init__(self, num_sequences: int, capacity: int) -> None:
        self.num_sequences, self.capacity = num_sequences, capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(self, layout: RaggedLayout, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Remember the keys and values of pieces (1, heads, T, d), and attend to what their sequences hold."""
        pieces = layout.chunks
        queries, keys, values = (each[0].transpose(0, 1) for each in (q, k, v))
        if self.keys is None or self.values is None:
            # Zeros, since what a mask hides is multiplied all the same.
            self.keys, self.values = keys.new_zeros(2, self.num_sequences, self.capacity, *keys.shape[1:])
        self.keys[layout.slots, pieces.positions] = keys
        self.values[layout.slots, pieces.positions] = values
        side_by_side = queries.new_zeros(len(pieces.slots), pieces.max_chunk_length, *queries.shape[1:])
        side_by_side[pieces.chunk_indices, layout.offsets] = queries
        held, held_values = (
            each[pieces.slots, : pieces.context_length].transpose(1, 2) for each in (self.keys, self.values)
        )
        q = side_by_side.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, held, held_values, attn_mask=layout.mask, dropout_p=dropout)
        return y.transpose(1, 2)[pieces.chunk_indices, layout.offsets].transpose(0, 1)[None]
