"""The GPT that models the codes of a VQGAN.

Language Models are Unsupervised Multitask Learners, Radford et al., 2019 (GPT-2), in the form of minGPT that
Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841, uses: learned positions,
layer norm before attention and MLP, exact GELU, an output head of its own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqf.registry import register


class Memory:
    """Keys and values of one layer, allocated once for the whole sequence."""

    def __init__(self, size: int) -> None:
        self.size, self.filled = size, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, heads, T, d) and return all that is remembered, as views."""
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
    """What a GPT remembers of a sequence: one memory for each layer, and how many tokens they hold."""

    memories: list[Memory]
    position: int


class Attention(nn.Module):
    """Multi-head self-attention, over a whole sequence or from one new token to a memory."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.residual_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, memory: Memory | None) -> Tensor:
        """Map (B, T, dim) to (B, T, dim); causal where no mask (T, T) of visible positions is given."""
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b h t d", h=self.heads)
            for project in (self.query, self.key, self.value)
        )
        if memory is not None:
            assert memory.filled == 0 or x.shape[1] == 1, "a memory grows by one token at a time"
            k, v = memory.extend(k, v)
        causal = mask is None and x.shape[1] > 1  # one new token sees all that is remembered
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.residual_dropout(self.proj(rearrange(y, "b h t d -> b t (h d)")))


class Block(nn.Module):
    """A transformer block: attention and MLP, each normalised before and added after."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """Map (B, T, dim) to (B, T, dim)."""
        x = x + self.attention(self.norm1(x), mask, memory)
        return x + self.mlp(self.norm2(x))


@register("prior", "gpt")
class GPT(nn.Module):
    """An autoregressive transformer over [prefix; tokens].

    Args:
        layers: Blocks.
        heads: Attention heads; they divide `dim`.
        dim: Width of the residual stream.
        dropout: Of the embeddings, the attention weights and both residual branches.
        pkeep: In training each input token stays with this probability and is otherwise a uniformly random
            code. The targets stay clean, the prefix is never touched.
        unmasked_prefix: Whether the prefix sees all of itself (true), or how many tokens of it do; causal otherwise.
        shared_vocabulary: Embed the prefix with the table of the codes, as taming-transformers does: id k of a
            condition is then the same vector as code k.
        gradient_checkpointing: Keep only the input of every block for the backward pass, which runs it again: less
            memory, up to a third more work, the same gradients.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int,
        prefix_vocab: int,
        prefix_length: int,
        *,
        layers: int = 24,
        heads: int = 16,
        dim: int = 1024,
        dropout: float = 0.0,
        pkeep: float = 1.0,
        unmasked_prefix: bool | int = False,
        shared_vocabulary: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(unmasked_prefix, int):
            raise ValueError(f"unmasked_prefix must be true, false or a number of tokens, not {unmasked_prefix}")
        self.unmasked = prefix_length if unmasked_prefix is True else int(unmasked_prefix)
        _check_sizes(layers, heads, dim, dropout, pkeep, prefix_length, self.unmasked)
        if shared_vocabulary and prefix_vocab > vocab_size:
            raise ValueError(
                f"shared_vocabulary=true: the prefix has {prefix_vocab} ids and the codebook only {vocab_size}; "
                "set shared_vocabulary=false"
            )
        self.vocab_size, self.length, self.prefix_length, self.pkeep = vocab_size, length, prefix_length, pkeep
        self.gradient_checkpointing = gradient_checkpointing
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.prefix_embedding = None if shared_vocabulary else nn.Embedding(prefix_vocab, dim)
        # The last token is predicted, never read.
        self.position_embedding = nn.Parameter(torch.zeros(1, prefix_length + length - 1, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.apply(_initialise)

    def forward(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        """Return logits (B, N, V); those of token n depend on the prefix and the tokens before n.

        Args:
            tokens: (B, N) int64 with N up to `length`; the last one is not read.
            prefix: (B, prefix_length) int64.
        """
        self._check(tokens, prefix)
        x = self._embed(prefix, tokens[:, :-1])
        mask = self._mask(x)
        for block in self.blocks:
            again = self.gradient_checkpointing
            x = checkpoint(block, x, mask, use_reentrant=False) if again else block(x, mask)
        return self.head(self.norm(x[:, self.prefix_length - 1 :]))

    def loss(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        """Return the mean cross-entropy of the tokens (B, N) in nats, computed in float32 or better."""
        logits = self(self._corrupt(tokens), prefix)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(rearrange(logits, "b n v -> (b n) v"), tokens.reshape(-1))

    @torch.no_grad()
    def begin(self, prefix: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Read a prefix (B, M), and the first tokens (B, n) if there are any, in one pass.

        Returns:
            The logits (B, V) of token n, and the cache that `advance` extends.
        """
        tokens = prefix[:, :0] if tokens is None else tokens
        self._check(torch.cat((tokens, tokens.new_zeros(len(tokens), 1)), dim=1), prefix)
        cache = Cache(
            [Memory(self.position_embedding.shape[1]) for _ in self.blocks], self.prefix_length + tokens.shape[1]
        )
        x = self._embed(prefix, tokens)
        return self._remember(x, self._mask(x), cache), cache

    @torch.no_grad()
    def advance(self, token: Tensor, cache: Cache) -> Tensor:
        """Read the next token (B,); return the logits (B, V) of the one after it."""
        if cache.position == self.position_embedding.shape[1]:
            raise ValueError(f"the sequence is full: the prior models {self.length} tokens")
        x = self.token_embedding(token[:, None]) + self.position_embedding[:, cache.position, None]
        cache.position += 1
        return self._remember(self.dropout(x), None, cache)

    def _remember(self, x: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        for block, memory in zip(self.blocks, cache.memories, strict=True):
            x = block(x, mask, memory)
        return self.head(self.norm(x[:, -1]))

    def _embed(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        embed_prefix = self.prefix_embedding or self.token_embedding
        x = torch.cat((embed_prefix(prefix), self.token_embedding(tokens)), dim=1)
        return self.dropout(x + self.position_embedding[:, : x.shape[1]])

    def _mask(self, x: Tensor) -> Tensor | None:
        if self.unmasked < 2:
            return None  # plain causal attention, which has faster kernels
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        visible[: self.unmasked, : self.unmasked] = True
        return visible

    def _corrupt(self, tokens: Tensor) -> Tensor:
        if not self.training or self.pkeep == 1:
            return tokens
        kept = torch.rand(tokens.shape, device=tokens.device) < self.pkeep
        return torch.where(kept, tokens, torch.randint_like(tokens, self.vocab_size))

    def _check(self, tokens: Tensor, prefix: Tensor) -> None:
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.length:
            raise ValueError(f"tokens must be (B, N) with N from 1 to {self.length}, not {tuple(tokens.shape)}")
        if prefix.shape != (len(tokens), self.prefix_length):
            raise ValueError(f"prefix must be {(len(tokens), self.prefix_length)}, not {tuple(prefix.shape)}")


def _check_sizes(
    layers: int, heads: int, dim: int, dropout: float, pkeep: float, prefix_length: int, unmasked: int
) -> None:
    for name, size in (("layers", layers), ("heads", heads), ("dim", dim)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
    if dim % heads:
        raise ValueError(f"heads={heads} must divide dim={dim}; the nearest dim that fits is {_multiple(dim, heads)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if not 0 <= pkeep <= 1:
        raise ValueError(f"pkeep is a probability, not {pkeep}")
    if prefix_length < 1:
        raise ValueError("a prior needs at least one token in front; model/conditioner=none gives a start token")
    if not 0 <= unmasked <= prefix_length:
        raise ValueError(f"unmasked_prefix must be from 0 to {prefix_length}, the prefix's length, not {unmasked}")


def _multiple(dim: int, heads: int) -> int:
    return max(round(dim / heads), 1) * heads


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
