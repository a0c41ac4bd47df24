"""The Llama-style prior of LlamaGen.

Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation, https://arxiv.org/abs/2406.06525: RMS norm,
SwiGLU (https://arxiv.org/abs/2002.05202), 2-D rotary positions (https://arxiv.org/abs/2104.09864), no biases. Optional
here: QK norm (https://arxiv.org/abs/2302.05442).
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqf.batch import GridPosition
from vqf.options.ranges import Depth, Dimension, PositiveFloat, Rate
from vqf.registry import register
from vqf.tokens.layout import TokenLayout
from vqf.tokens.prefix import PrefixSpec
from vqf.transformers.layers.causal import CausalTransformer
from vqf.transformers.layers.kv_cache import AttentionFn

EPS = 1e-5


def rotary_angles(positions: Sequence[GridPosition | None], head_dim: int, base: float) -> Tensor:
    """Rotation angles of tokens (n, head_dim / 2), in radians.

    The first half is the row times the frequencies base^(-2 k / (head_dim / 2)), the second half the column times them.
    A token without a position has 0; LlamaGen sets its queries and keys to 0.
    """
    frequencies = base ** (-torch.arange(0, head_dim // 2, 2, dtype=torch.float64) / (head_dim // 2))
    coordinates = torch.tensor([position or (0.0, 0.0) for position in positions], dtype=torch.float64)
    return (coordinates[:, :, None] * frequencies).flatten(1)


def apply_rotary(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of neighboring channels of x (..., T, d) by cosines and sines (2, T, d / 2)."""
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), rotation  # `rotation` is float32, so products are
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    def __init__(self, dim: int, heads: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.query_norm = nn.RMSNorm(dim // heads, eps=EPS) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(dim // heads, eps=EPS) if qk_norm else nn.Identity()
        self.residual_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attend: AttentionFn, rotation: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        q, k = apply_rotary(self.query_norm(q), rotation), apply_rotary(self.key_norm(k), rotation)
        y = attend(q, k, v, self.dropout if self.training else 0.0)
        return self.residual_dropout(self.proj(rearrange(y, "b h t d -> b t (h d)")))


class SwiGLU(nn.Module):
    """proj(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.proj = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=EPS)
        self.attention = Attention(dim, heads, dropout, qk_norm)
        self.norm2 = nn.RMSNorm(dim, eps=EPS)
        self.mlp = SwiGLU(dim, hidden, dropout)

    def forward(self, x: Tensor, attend: AttentionFn, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), attend, rotation)
        return x + self.mlp(self.norm2(x))


@register("prior", "llama")
class Llama(CausalTransformer):
    """An autoregressive transformer over [prefix; tokens] with 2-D rotary positions.

    A prefix token with a position in the image is rotated like the image token there.

    Args:
        layers: Number of blocks.
        heads: Attention heads; `dim` is a multiple of 4 times their number.
        dim: Width of the residual stream.
        multiple_of: The hidden width of the MLP is 8/3 of `dim`, rounded up to a multiple of this.
        base: Base of the rotation frequencies.
        qk_norm: Normalize queries and keys of each head, which keeps large models stable; LlamaGen does not.
        dropout: Rate at the embeddings, the attention weights and both residual branches; 0.1 in LlamaGen.
        gradient_checkpointing: Keep only the input of each block for the backward pass, and recompute the block: less
            memory, up to a third more work, the same gradients.
    """

    rotation: Tensor
    levels: Tensor  # (M + T,) index of the level embedding of each position

    def __init__(
        self,
        layout: TokenLayout,
        prefix: PrefixSpec,
        *,
        layers: Depth = 12,
        heads: Dimension = 12,
        dim: Dimension = 768,
        multiple_of: Dimension = 256,
        base: PositiveFloat = 10000.0,
        qk_norm: bool = False,
        dropout: Rate = 0.1,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(layout, prefix, dim)
        _check_dim(dim, heads)
        self.gradient_checkpointing = gradient_checkpointing
        self.token_embedding = nn.Embedding(sum(layout.vocab_sizes), dim)
        self.prefix_embedding = nn.Embedding(max(prefix.vocab_size, 1), dim)
        self.dropout = nn.Dropout(dropout)
        hidden = -(-(8 * dim // 3) // multiple_of) * multiple_of
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, dropout, qk_norm) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, layout.vocab_size, bias=False)
        places = [*(prefix.positions or [None] * prefix.length), *_places(layout)]
        angles = rotary_angles(places, dim // heads, base)
        self.register_buffer("rotation", torch.stack((angles.cos(), angles.sin())).float(), persistent=False)
        self._add_level_embedding(layout, dim)
        self.apply(_init_weights)
        nn.init.zeros_(self.head.weight)

    def forward_blocks(self, x: Tensor, positions: slice | Tensor, attention_fns: Sequence[AttentionFn]) -> Tensor:
        if self.level_embedding is not None:
            x = x + self.level_embedding(self.levels[positions])
        return self.apply_blocks(self.dropout(x), attention_fns, self.rotation[:, positions])

    def _add_level_embedding(self, layout: TokenLayout, dim: int) -> None:
        """Scales and codebooks share places, so they get a learned embedding, and the prefix another."""
        scale, _, _, codebook = layout.coordinates().T
        count = len(layout.scales) * layout.codebooks
        self.level_embedding = nn.Embedding(count + 1, dim) if count > 1 else None
        levels = torch.cat([torch.full((self.prefix_length,), count), scale * layout.codebooks + codebook])
        self.register_buffer("levels", levels, persistent=False)


def _places(layout: TokenLayout) -> list[GridPosition]:
    """Row and column of each token, those of coarser scales in cells of the last one."""
    height, width = layout.scales[-1]
    return [
        ((row + 0.5) * height / rows - 0.5, (column + 0.5) * width / columns - 0.5)
        for rows, columns in layout.scales
        for row, column, _ in itertools.product(range(rows), range(columns), range(layout.codebooks))
    ]


def _check_dim(dim: int, heads: int) -> None:
    if dim % (4 * heads):
        near = max(round(dim / (4 * heads)), 1) * 4 * heads
        raise ValueError(f"dim={dim} must be a multiple of 4 * heads = {4 * heads}; the nearest that fits is {near}")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
