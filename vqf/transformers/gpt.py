"""The GPT prior of VQGAN.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841, and GPT-2 (Language Models
are Unsupervised Multitask Learners, Radford et al., 2019).
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from vqf.options.ranges import Depth, Dimension, Fraction, NonNegativeInt, Rate
from vqf.registry import register
from vqf.tokens.layout import TokenLayout
from vqf.tokens.prefix import Prefix, PrefixSpec
from vqf.transformers.layers.causal import CausalTransformer, cross_entropy
from vqf.transformers.layers.kv_cache import AttentionFn


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.residual_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attend: AttentionFn) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b h t d", h=self.heads)
            for project in (self.query, self.key, self.value)
        )
        y = attend(q, k, v, self.dropout if self.training else 0.0)
        return self.residual_dropout(self.proj(rearrange(y, "b h t d -> b t (h d)")))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, attend: AttentionFn) -> Tensor:
        x = x + self.attention(self.norm1(x), attend)
        return x + self.mlp(self.norm2(x))


@register("prior", "gpt")
class GPT(CausalTransformer):
    """An autoregressive transformer over [prefix; tokens].

    Args:
        layers: Number of blocks.
        heads: Attention heads; their number divides `dim`.
        dim: Width of the residual stream.
        dropout: Rate at the embeddings, the attention weights and both residual branches.
        pkeep: In training each input token is kept with this probability, and else replaced by a uniformly random one.
            Targets and prefix are not.
        unmasked_prefix: Tokens of the prefix that all see each other: true for all, or their number. The others attend
            causally.
        shared_vocabulary: Embed the prefix with the table of the tokens, as taming-transformers does: prefix id k gets
            the same vector as token k.
        gradient_checkpointing: Keep only the input of each block for the backward pass, and recompute the block: less
            memory, up to a third more work, the same gradients.
    """

    def __init__(
        self,
        layout: TokenLayout,
        prefix: PrefixSpec,
        *,
        layers: Depth = 24,
        heads: Dimension = 16,
        dim: Dimension = 1024,
        dropout: Rate = 0.0,
        pkeep: Fraction = 1.0,
        unmasked_prefix: bool | NonNegativeInt = False,
        shared_vocabulary: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(layout, prefix, dim)
        self.bidirectional_prefix = prefix.length if unmasked_prefix is True else int(unmasked_prefix)
        _check_options(heads, dim, prefix.length, self.bidirectional_prefix)
        codes = sum(layout.vocab_sizes)
        if shared_vocabulary and prefix.vocab_size > codes:
            raise ValueError(
                f"shared_vocabulary=true: the prefix has {prefix.vocab_size} ids and the codebook only {codes}; "
                "set shared_vocabulary=false"
            )
        self.pkeep, self.gradient_checkpointing = pkeep, gradient_checkpointing
        self.token_embedding = nn.Embedding(codes, dim)
        self.prefix_embedding = None if shared_vocabulary else nn.Embedding(max(prefix.vocab_size, 1), dim)
        self.position_embedding = nn.Parameter(torch.zeros(1, self.max_positions, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, layout.vocab_size, bias=False)
        self.apply(_init_weights)

    def forward_blocks(self, x: Tensor, positions: slice | Tensor, attention_fns: Sequence[AttentionFn]) -> Tensor:
        return self.apply_blocks(self.dropout(x + self.position_embedding[:, positions]), attention_fns)

    def loss(self, tokens: Tensor, prefix: Prefix | Tensor) -> Tensor:
        return cross_entropy(self(self._corrupt(tokens), prefix), tokens)

    def _corrupt(self, tokens: Tensor) -> Tensor:
        if not self.training or self.pkeep == 1:
            return tokens
        kept = torch.rand(tokens.shape, device=tokens.device) < self.pkeep
        return torch.where(kept, tokens, self.random_tokens_like(tokens))


def _check_options(heads: int, dim: int, prefix_length: int, bidirectional_prefix: int) -> None:
    if dim % heads:
        raise ValueError(
            f"heads={heads} must divide dim={dim}; the nearest dim that fits is {_nearest_multiple(dim, heads)}"
        )
    if bidirectional_prefix > prefix_length:
        raise ValueError(
            f"unmasked_prefix must be from 0 to {prefix_length}, the prefix's length, not {bidirectional_prefix}"
        )


def _nearest_multiple(dim: int, heads: int) -> int:
    return max(round(dim / heads), 1) * heads


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
