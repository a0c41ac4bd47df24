"""The base class of causal transformers over [prefix; tokens].

Position p < M holds prefix id p, position M + n token n. The hidden state of position M - 1 + n gives the logits of
token n, so that the last token is never read.
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
    """A causal transformer; a subclass sets the attributes below, and implements `forward_blocks`."""

    vocab_size: int
    length: int  # N, tokens of an image
    prefix_length: int  # M
    bidirectional_prefix: int = 0  # so many of the first positions see each other; the others attend causally
    gradient_checkpointing: bool
    token_embedding: nn.Embedding
    prefix_embedding: nn.Embedding | None  # None: prefix ids use `token_embedding`
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    @property
    def max_positions(self) -> int:
        return self.prefix_length + self.length - 1

    @property
    def sequence_bytes(self) -> int:
        """Bytes of the keys and values of one sequence."""
        return 2 * len(self.blocks) * self.max_positions * self.head.in_features * self.head.weight.element_size()

    def forward_blocks(self, x: Tensor, positions: slice | Tensor, attention_fns: Sequence[AttentionFn]) -> Tensor:
        """Pass embedded ids (B, T, dim) through the blocks, with one attention function each."""
        raise NotImplementedError

    def apply_blocks(self, x: Tensor, attention_fns: Sequence[AttentionFn], *extra: Tensor) -> Tensor:
        for block, attend in zip(self.blocks, attention_fns, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attend, *extra, use_reentrant=False)
            else:
                x = block(x, attend, *extra)
        return x

    def forward(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        """Logits (B, N, V) of tokens (B, N) int64, given the prefix (B, M) int64; the last token is not read."""
        self._check_inputs(tokens, prefix)
        x = self._embed(prefix, tokens[:, :-1])
        attend = FullAttention(self._attention_mask(x))
        x = self.forward_blocks(x, slice(x.shape[1]), [attend] * len(self.blocks))
        return self.head(self.norm(x[:, self.prefix_length - 1 :]))

    def loss(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        return cross_entropy(self(tokens, prefix), tokens)

    @torch.no_grad()
    def prefill(self, prefix: Tensor) -> tuple[Tensor, DecodingState]:
        """Read a prefix (B, M). Returns the logits (B, V) of token 0, and the cache."""
        self._check_inputs(prefix.new_zeros(len(prefix), 1), prefix)
        x = self._embed(prefix, prefix[:, :0])
        prefix_attention = FullAttention(self._attention_mask(x))
        cache = DecodingState([KVCache(self.max_positions, prefix_attention) for _ in self.blocks], 0)
        return self._forward_cached(x, cache), cache

    @torch.no_grad()
    def decode(self, token: Tensor, cache: DecodingState) -> Tensor:
        """Read the next token (B,). Returns the logits (B, V) of the one after it.

        Raises:
            ValueError: If the last position has been read already.
        """
        if cache.position == self.max_positions:
            raise ValueError(f"the sequence is full: the prior models {self.length} tokens")
        return self._forward_cached(self.token_embedding(token[:, None]), cache)

    def allocate_cache(self, num_sequences: int) -> list[SlotKVCache]:
        return [SlotKVCache(num_sequences, self.max_positions) for _ in self.blocks]

    @torch.no_grad()
    def decode_chunks(self, chunks: RaggedChunks, cache: Sequence[SlotKVCache]) -> Tensor:
        layout = RaggedLayout.from_chunks(chunks, self.bidirectional_prefix)
        in_prefix = chunks.positions < self.prefix_length
        # Both tables are read at every position, with id 0 where an id belongs to the other table.
        x = torch.where(
            in_prefix[:, None],
            (self.prefix_embedding or self.token_embedding)(chunks.ids.where(in_prefix, 0)),
            self.token_embedding(chunks.ids.where(~in_prefix, 0)),
        )
        x = self.forward_blocks(x[None], chunks.positions, [partial(layer.attend, layout) for layer in cache])
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
            return None  # causal attention without a mask has faster kernels
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        visible[: self.bidirectional_prefix, : self.bidirectional_prefix] = True
        return visible

    def _check_inputs(self, tokens: Tensor, prefix: Tensor) -> None:
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.length:
            raise ValueError(f"tokens must be (B, N) with N from 1 to {self.length}, not {tuple(tokens.shape)}")
        if prefix.shape != (len(tokens), self.prefix_length):
            raise ValueError(f"prefix must be {(len(tokens), self.prefix_length)}, not {tuple(prefix.shape)}")


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of tokens (B, N) under logits (B, N, V), in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(rearrange(logits, "b n v -> (b n) v"), tokens.reshape(-1))


def check_options(dropout: float, prefix_length: int, **sizes: int) -> None:
    """Check the options that all priors share.

    Raises:
        ValueError: If one is out of range.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if prefix_length < 1:
        raise ValueError("a prior needs at least one prefix token; model/conditioner=none is a start token")
