"""Blocks of the encoders and decoders that are vision transformers.

An Image is Worth 16x16 Words, https://arxiv.org/abs/2010.11929, with fixed 2-D positions as in
https://arxiv.org/abs/2104.02057, so that a model takes images of any size and aspect.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from einops import rearrange
from torch import Tensor, nn

from vqf.batch import Size
from vqf.encoders.conv_blocks import apply_blocks

Ratio = Annotated[int, Interval(ge=1, le=64)]
PatchSide = Annotated[int, Interval(ge=1, le=256)]
BASE = 10_000.0  # of the frequencies of positions
EPS = 1e-6


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over all positions, for each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `dropout` is that of both branches."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Blocks and a layer norm, (B, n, width) -> (B, n, width).

    Raises:
        ValueError: If `width` is not a multiple of 4, for the positions, and of `heads`.
    """

    def __init__(
        self, width: int, layers: int, heads: int, hidden: int, dropout: float, gradient_checkpointing: bool
    ) -> None:
        super().__init__()
        if width % heads or width % 4:
            raise ValueError(f"width={width} must be a multiple of heads={heads} and of 4")
        self.gradient_checkpointing = gradient_checkpointing
        self.blocks = nn.ModuleList(Block(width, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(apply_blocks(self.blocks, x, self.gradient_checkpointing))


def init_linear(module: nn.Module) -> None:
    """Initialize the weight of a linear layer by Glorot's rule, its bias with 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def sincos_positions(grid: Size, width: int, like: Tensor) -> Tensor:
    """Sines, then cosines, of rows and columns times width / 4 frequencies: (h * w, width), row by row.

    Args:
        like: Its device and dtype are those of the result.
    """
    count = width // 4
    frequencies = BASE ** -(torch.arange(count, device=like.device) / count)
    cells = torch.ones(grid, device=like.device).nonzero()  # (h * w, 2) row and column
    angles = (cells[:, :, None] * frequencies).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


def add_positions(cells: Tensor) -> Tensor:
    """Turn cells (B, width, h, w) into a sequence (B, h * w, width), with their positions added."""
    sequence = cells.flatten(2).transpose(1, 2)
    return sequence + sincos_positions((cells.shape[2], cells.shape[3]), cells.shape[1], cells)


class TanhHead(nn.Sequential):
    """The two linear layers, and a tanh between them, of both ends of ViT-VQGAN."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, dim))
        self.apply(init_linear)
