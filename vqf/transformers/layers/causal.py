"""The base class of causal transformers over [prefix; tokens].

Position p < M holds prefix token p, position M + n token n. The hidden state of position M - 1 + n gives the logits of
token n, so that the last token is never read.

The codes of all codebooks are numbered in a row: each has an embedding of its own. The logits are as many as the
largest codebook has codes, and -inf beyond the codebook of the token.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqf.protocols import RaggedChunks
from vqf.tokens.layout import TokenLayout
from vqf.tokens.prefix import EMBEDDED, Prefix, PrefixSpec
from vqf.transformers.layers.kv_cache import (
    AttentionFn,
    DecodingState,
    FullAttention,
    KVCache,
    RaggedLayout,
    SlotKVCache,
)

MAX_VOCAB = 2**20  # embeddings of codes in one table


class CausalTransformer(nn.Module):
    """A causal transformer; a subclass sets the attributes without a value, and implements `forward_blocks`.

    Raises:
        ValueError: If the codes cannot be embedded, or there is no prefix.
    """

    likelihood = True
    bidirectional_prefix: int = 0  # so many of the first positions see each other; the others attend causally
    gradient_checkpointing: bool
    token_embedding: nn.Embedding
    prefix_embedding: nn.Embedding | None  # None: prefix ids use `token_embedding`
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear
    vocab_offsets: Tensor | None  # (K,) first id of each codebook; None with one codebook
    vocab_sizes: Tensor | None  # (K,)
    beyond_vocab: Tensor | None  # (K, V) logits without a code; None if all codebooks have one size

    def __init__(self, layout: TokenLayout, prefix: PrefixSpec, dim: int) -> None:
        super().__init__()
        if prefix.length < 1:
            raise ValueError("a prior needs at least one prefix token; model/conditioner=none is a start token")
        if sum(layout.vocab_sizes) > MAX_VOCAB:
            raise ValueError(
                f"a codebook of {layout.vocab_size:,} codes is too large for a table of embeddings (at most "
                f"{MAX_VOCAB:,}); choose a quantizer whose codes have several factors"
            )
        self.layout, self.prefix_length, self.length = layout, prefix.length, layout.length
        self.groups = (1,) * layout.length
        self.prefix_projection = nn.Linear(prefix.embedding_dim, dim) if prefix.embedding_dim else None
        several = layout.codebooks > 1
        offsets, sizes = torch.tensor(layout.vocab_offsets), torch.tensor(layout.vocab_sizes)
        beyond = torch.arange(layout.vocab_size) >= sizes[:, None] if len({*layout.vocab_sizes}) > 1 else None
        self.register_buffer("vocab_offsets", offsets if several else None, persistent=False)
        self.register_buffer("vocab_sizes", sizes if several else None, persistent=False)
        self.register_buffer("beyond_vocab", beyond, persistent=False)

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

    def forward(self, tokens: Tensor, prefix: Prefix | Tensor) -> Tensor:
        """Logits (B, n, V) of the first tokens (B, n) int64; the last one is not read."""
        prefix = Prefix.of(prefix)
        self._check_inputs(tokens, prefix)
        read = tokens[:, :-1]
        x = torch.cat((self._embed_prefix(prefix), self._embed_tokens(read, self._codebooks(read))), dim=1)
        attend = FullAttention(self._attention_mask(x))
        x = self.forward_blocks(x, slice(x.shape[1]), [attend] * len(self.blocks))
        return self._logits(x[:, self.prefix_length - 1 :])

    def loss(self, tokens: Tensor, prefix: Prefix | Tensor) -> Tensor:
        return cross_entropy(self(tokens, prefix), tokens)

    @torch.no_grad()
    def prefill(self, prefix: Prefix | Tensor) -> tuple[Tensor, DecodingState]:
        """Read a prefix. Returns the logits (B, 1, V) of token 0, and the cache."""
        prefix = Prefix.of(prefix)
        self._check_inputs(prefix.ids.new_zeros(len(prefix), 1), prefix)
        x = self._embed_prefix(prefix)
        prefix_attention = FullAttention(self._attention_mask(x))
        cache = DecodingState([KVCache(self.max_positions, prefix_attention) for _ in self.blocks], 0)
        return self._forward_cached(x, cache), cache

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: DecodingState) -> Tensor:
        """Read the next token (B, 1). Returns the logits (B, 1, V) of the one after it.

        Raises:
            ValueError: If the last position has been read already.
        """
        if cache.position == self.max_positions:
            raise ValueError(f"the sequence is full: the prior models {self.length} tokens")
        codebooks = self._codebooks(tokens, cache.position - self.prefix_length)
        return self._forward_cached(self._embed_tokens(tokens, codebooks), cache)

    def allocate_cache(self, num_sequences: int) -> list[SlotKVCache]:
        return [SlotKVCache(num_sequences, self.max_positions) for _ in self.blocks]

    @torch.no_grad()
    def decode_chunks(self, chunks: RaggedChunks, cache: Sequence[SlotKVCache]) -> Tensor:
        layout = RaggedLayout.from_chunks(chunks, self.bidirectional_prefix)
        in_prefix = chunks.positions < self.prefix_length
        # Both tables are read at every position, with id 0 where an id belongs to the other table.
        codebooks = (chunks.positions - self.prefix_length) % self.layout.codebooks
        x = torch.where(
            in_prefix[:, None],
            self._prefix_table(chunks.ids.where(in_prefix, 0)),
            self._embed_tokens(chunks.ids.where(~in_prefix, 0), codebooks),
        )
        x = self.forward_blocks(x[None], chunks.positions, [partial(layer.attend, layout) for layer in cache])
        following = (codebooks[chunks.ends] + 1) % self.layout.codebooks
        return self._mask_vocab(self.head(self.norm(x[0, chunks.ends])), following)

    def _forward_cached(self, x: Tensor, cache: DecodingState) -> Tensor:
        start, cache.position = cache.position, cache.position + x.shape[1]
        x = self.forward_blocks(x, slice(start, cache.position), cache.kv_caches)
        return self._logits(x[:, -1:], cache.position - self.prefix_length)

    def _logits(self, x: Tensor, first: int = 0) -> Tensor:
        """The logits (B, n, V) of the tokens from `first` on."""
        return self._mask_vocab(self.head(self.norm(x)), self._codebooks(x, first))

    def _mask_vocab(self, logits: Tensor, codebooks: Tensor | None) -> Tensor:
        if self.beyond_vocab is None or codebooks is None:
            return logits
        return logits.masked_fill(self.beyond_vocab[codebooks], -torch.inf)

    def _embed_tokens(self, tokens: Tensor, codebooks: Tensor | None) -> Tensor:
        if self.vocab_offsets is not None and codebooks is not None:
            tokens = tokens + self.vocab_offsets[codebooks]
        return self.token_embedding(tokens)

    def random_tokens_like(self, tokens: Tensor) -> Tensor:
        """Uniformly random codes in the shape of tokens (B, n)."""
        random, codebooks = torch.randint_like(tokens, self.layout.vocab_size), self._codebooks(tokens)
        if self.vocab_sizes is None or codebooks is None:
            return random
        return random % self.vocab_sizes[codebooks]

    def _codebooks(self, x: Tensor, first: int = 0) -> Tensor | None:
        """The codebook of each token (n,) of x (B, n, ...), of which the first has the index `first`; None with one."""
        if self.layout.codebooks == 1:
            return None  # decoding calls this twice a token
        return torch.arange(first, first + x.shape[1], device=x.device) % self.layout.codebooks

    def _embed_prefix(self, prefix: Prefix) -> Tensor:
        if self.prefix_projection is None or prefix.embeddings is None:
            return self._prefix_table(prefix.ids)
        embedded = prefix.ids == EMBEDDED
        ids = self._prefix_table(prefix.ids.masked_fill(embedded, 0))
        projected = self.prefix_projection(prefix.embeddings.to(self.prefix_projection.weight.dtype))
        return torch.where(embedded[..., None], projected.to(ids.dtype), ids)

    def _prefix_table(self, ids: Tensor) -> Tensor:
        return (self.prefix_embedding or self.token_embedding)(ids)

    def _attention_mask(self, x: Tensor) -> Tensor | None:
        if self.bidirectional_prefix < 2:
            return None  # causal attention without a mask has faster kernels
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        visible[: self.bidirectional_prefix, : self.bidirectional_prefix] = True
        return visible

    def _check_inputs(self, tokens: Tensor, prefix: Prefix) -> None:
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.length:
            raise ValueError(f"tokens must be (B, N) with N from 1 to {self.length}, not {tuple(tokens.shape)}")
        if prefix.ids.shape != (len(tokens), self.prefix_length):
            raise ValueError(f"prefix must be {(len(tokens), self.prefix_length)}, not {tuple(prefix.ids.shape)}")


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of tokens (B, N) under logits (B, N, V), in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(rearrange(logits, "b n v -> (b n) v"), tokens.reshape(-1))
