"""What causal transformers over [prefix; tokens] share: the loss, and keys and values that are computed once.

Two ways to remember. A `Memory` holds sequences that are read side by side, a token at a time: what the sampler
`autoregressive` needs. A `Shelf` holds many sequences that are read in pieces, each of its own length: what sliding
windows need. Pieces run end to end through all that looks at single tokens, without padding; only attention sets them
side by side.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqf.protocols import RaggedChunks
from vqf.transformers.layers.kv_cache import (
    AttentionFn,
    DecodingState,
    FullAttention,
    KVCache,
    RaggedLayout,
    SlotKVCache,
)


class CausalTransformer(nn.Module):
    """A causal transformer over [prefix; tokens]: what it does with its blocks, whatever they are.

    A subclass sets what is declared here, and says in `forward_blocks` how positions and blocks act.
    """

    vocab_size: int
    length: int  # tokens
    prefix_length: int
    bidirectional_prefix: int = 0  # how many of the first positions see each other
    gradient_checkpointing: bool
    token_embedding: nn.Embedding
    prefix_embedding: nn.Embedding | None  # None where the prefix shares the table of the tokens
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    @property
    def max_positions(self) -> int:
        """Positions of a sequence; the last token is predicted, never read."""
        return self.prefix_length + self.length - 1

    @property
    def sequence_bytes(self) -> int:
        """Bytes of the keys and values of one sequence, in the precision of the weights."""
        return 2 * len(self.blocks) * self.max_positions * self.head.in_features * self.head.weight.element_size()

    def forward_blocks(self, x: Tensor, positions: slice | Tensor, attention_fns: Sequence[AttentionFn]) -> Tensor:
        """Return what the last block makes of embedded ids (B, T, dim) at some positions; one `attend` per block."""
        raise NotImplementedError

    def apply_blocks(self, x: Tensor, attention_fns: Sequence[AttentionFn], *extra: Tensor) -> Tensor:
        """Pass x (B, T, dim) through the blocks, each of which takes x, how it attends, and what else they need."""
        for block, attend in zip(self.blocks, attention_fns, strict=True):
            again = self.gradient_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, attend, *extra, use_reentrant=False) if again else block(x, attend, *extra)
        return x

    def forward(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        """Return logits (B, N, V); those of token n depend on the prefix and the tokens before n.

        Args:
            tokens: (B, N) int64 with N up to `length`; the last one is not read.
            prefix: (B, prefix_length) int64.
        """
        self._check_inputs(tokens, prefix)
        x = self._embed(prefix, tokens[:, :-1])
        attend = FullAttention(self._attention_mask(x))
        x = self.forward_blocks(x, slice(x.shape[1]), [attend] * len(self.blocks))
        return self.head(self.norm(x[:, self.prefix_length - 1 :]))

    def loss(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        """Return the mean cross-entropy of the tokens (B, N) in nats, computed in float32 or better."""
        return cross_entropy(self(tokens, prefix), tokens)

    @torch.no_grad()
    def prefill(self, prefix: Tensor) -> tuple[Tensor, DecodingState]:
        """Read a prefix (B, M); return the logits (B, V) of token 0, and the cache that `decode` extends."""
        self._check_inputs(prefix.new_zeros(len(prefix), 1), prefix)
        x = self._embed(prefix, prefix[:, :0])
        first = FullAttention(self._attention_mask(x))
        cache = DecodingState([KVCache(self.max_positions, first) for _ in self.blocks], 0)
        return self._forward_cached(x, cache), cache

    @torch.no_grad()
    def decode(self, token: Tensor, cache: DecodingState) -> Tensor:
        """Read the next token (B,); return the logits (B, V) of the one after it."""
        if cache.position == self.max_positions:
            raise ValueError(f"the sequence is full: the prior models {self.length} tokens")
        return self._forward_cached(self.token_embedding(token[:, None]), cache)

    def allocate_cache(self, num_sequences: int) -> list[SlotKVCache]:
        """Return an empty cache for the pieces of so many sequences."""
        return [SlotKVCache(num_sequences, self.max_positions) for _ in self.blocks]

    @torch.no_grad()
    def decode_chunks(self, chunks: RaggedChunks, cache: Sequence[SlotKVCache]) -> Tensor:
        """Read pieces of sequences in one pass; return the logits (n, V) of the token after each piece."""
        layout = RaggedLayout.from_chunks(chunks, self.bidirectional_prefix)
        in_prefix = chunks.positions < self.prefix_length
        x = torch.where(
            in_prefix[:, None],
            (self.prefix_embedding or self.token_embedding)(chunks.ids.where(in_prefix, 0)),
            self.token_embedding(chunks.ids.where(~in_prefix, 0)),
        )
        x = self.forward_blocks(x[None], chunks.positions, [partial(shelf.attend, layout) for shelf in cache])
        return self.head(self.norm(x[0, chunks.ends]))

    def _forward_cached(self, x: Tensor, cache: DecodingState) -> Tensor:
        start, cache.position = cache.position, cache.position + x.shape[1]
        x = self.forward_blocks(x, slice(start, cache.position), cache.kv_caches)
        return self.head(self.norm(x[:, -1]))

    def _embed(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        embed_prefix = self.prefix_embedding or self.token_embedding
        return torch.cat((embed_prefix(prefix), self.token_embedding(tokens)), dim=1)

    def _attention_mask(self, x: Tensor) -> Tensor | None:
        if self.bidirectional_prefix < 2:
            return None  # plain causal attention, which has faster kernels
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        visible[: self.bidirectional_prefix, : self.bidirectional_prefix] = True
        return visible

    def _check_inputs(self, tokens: Tensor, prefix: Tensor) -> None:
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.length:
            raise ValueError(f"tokens must be (B, N) with N from 1 to {self.length}, not {tuple(tokens.shape)}")
        if prefix.shape != (len(tokens), self.prefix_length):
            raise ValueError(f"prefix must be {(len(tokens), self.prefix_length)}, not {tuple(prefix.shape)}")


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of tokens (B, N) under logits (B, N, V), in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(rearrange(logits, "b n v -> (b n) v"), tokens.reshape(-1))
