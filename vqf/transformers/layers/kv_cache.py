"""What causal transformers over [prefix; tokens] share: the loss, and keys and values that are computed once.

Two ways to remember. A `Memory` holds sequences that are read side by side, a token at a time: what the sampler
`autoregressive` needs. A `Shelf` holds many sequences that are read in pieces, each of its own length: what sliding
windows need. Pieces run end to end through all that looks at single tokens, without padding; only attention sets them
side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.protocols import Pieces

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # queries, keys, values (B, heads, T, d), dropout -> same


@dataclass
class Whole:
    """Attention within whole sequences; causal where no mask (T, T) of visible positions is given."""

    mask: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Return (B, heads, T, d)."""
        causal = self.mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=dropout, is_causal=causal)


class Memory:
    """Keys and values of one layer, allocated once for the whole sequence.

    Args:
        size: Positions of a sequence.
        first: How what is read at first sees itself. Later it grows by one token at a time, which sees all.
    """

    def __init__(self, size: int, first: Whole) -> None:
        self.size, self.first, self.filled = size, first, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Remember keys and values, and attend to all that is remembered."""
        assert self.filled == 0 or q.shape[2] == 1, "a memory grows by one token at a time"
        attend = Whole() if self.filled else self.first
        return attend(q, *self._extend(k, v), dropout)

    def _extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            # Allocated here, where autocast has already chosen the dtype.
            batch, heads, _, dim = keys.shape
            self.keys, self.values = keys.new_empty(2, batch, heads, self.size, dim)
        start, self.filled = self.filled, self.filled + keys.shape[2]
        self.keys[:, :, start : self.filled] = keys
        self.values[:, :, start : self.filled] = values
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]


@dataclass
class Cache:
    """What a prior remembers of sequences side by side: one memory for each layer, and how many tokens they hold."""

    memories: list[Memory]
    position: int


@dataclass
class Layout:
    """Where the tokens of pieces stand, in one piece and in the cache: the same in every layer."""

    pieces: Pieces
    sequences: Tensor  # (T,) that of each token
    offsets: Tensor  # (T,) of each token in its piece
    mask: Tensor  # (n, 1, longest, reach): what a token of a piece sees of its sequence

    @classmethod
    def of(cls, pieces: Pieces, unmasked: int) -> "Layout":
        """Lay out pieces of sequences whose first positions, `unmasked` of them, see each other."""
        firsts = torch.cat((pieces.ends.new_zeros(1), pieces.ends[:-1] + 1))
        count = torch.arange(max(len(pieces.ids), pieces.reach), device=pieces.ids.device)
        here = (pieces.positions[firsts, None] + count[: pieces.longest])[:, :, None]
        there = count[: pieces.reach]
        mask = there <= here
        if unmasked > 1:
            mask |= (there < unmasked) & (here < unmasked)
        offsets = count[: len(pieces.ids)] - firsts[pieces.owners]
        return cls(pieces, pieces.slots[pieces.owners], offsets, mask[:, None])


class Shelf:
    """Keys and values of one layer, for many sequences.

    Args:
        sequences: How many.
        size: Positions of each.
    """

    def __init__(self, sequences: int, size: int) -> None:
        self.sequences, self.size = sequences, size
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(self, layout: Layout, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """Remember the keys and values of pieces (1, heads, T, d), and attend to what their sequences hold."""
        pieces = layout.pieces
        queries, keys, values = (each[0].transpose(0, 1) for each in (q, k, v))
        if self.keys is None or self.values is None:
            # Zeros, since what a mask hides is multiplied all the same.
            self.keys, self.values = keys.new_zeros(2, self.sequences, self.size, *keys.shape[1:])
        self.keys[layout.sequences, pieces.positions] = keys
        self.values[layout.sequences, pieces.positions] = values
        side_by_side = queries.new_zeros(len(pieces.slots), pieces.longest, *queries.shape[1:])
        side_by_side[pieces.owners, layout.offsets] = queries
        held, held_values = (each[pieces.slots, : pieces.reach].transpose(1, 2) for each in (self.keys, self.values))
        q = side_by_side.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, held, held_values, attn_mask=layout.mask, dropout_p=dropout)
        return y.transpose(1, 2)[pieces.owners, layout.offsets].transpose(0, 1)[None]
