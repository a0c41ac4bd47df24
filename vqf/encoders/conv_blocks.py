"""Blocks of the convolutional encoder and decoder.

Denoising Diffusion Probabilistic Models, https://arxiv.org/abs/2006.11239.
"""

from collections.abc import Iterable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with 32 groups, or the largest smaller power of 2 that fits."""
    groups = next(n for n in (32, 16, 8, 4, 2, 1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        changes = in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


MAX_FULL_MATRIX = 4096  # positions; 17 GB for 65,536. Below it is fast, and the copies would cost memory in training


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        if q.shape[2] > MAX_FULL_MATRIX:  # of strided tensors torch computes the full matrix of attention
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halves both sides by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbor, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then `resample`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        attention: bool,
        dropout: float,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.block = nn.ModuleList(
            ResidualBlock(out_channels if i else in_channels, out_channels, dropout) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(blocks if attention else 0))
        self.resample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(self.forward_blocks(x))

    def forward_blocks(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = apply_blocks([block, self.attn[i]] if self.attn else [block], x, self.gradient_checkpointing)
        return x


def mid_block(channels: int, dropout: float, attention: bool) -> nn.Sequential:
    """The blocks next to the codebook."""
    blocks: list[nn.Module] = [ResidualBlock(channels, channels, dropout), ResidualBlock(channels, channels, dropout)]
    if attention:
        blocks.insert(1, AttentionBlock(channels))
    return nn.Sequential(*blocks)


def apply_blocks(blocks: Iterable[nn.Module], x: Tensor, gradient_checkpointing: bool) -> Tensor:
    """Apply blocks in order."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if gradient_checkpointing else block(x)
    return x


class PixelShuffleUpsample(nn.Module):
    """A convolution and a pixel-shuffle."""

    def __init__(self, in_channels: int, channels: int, patch_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels * patch_size**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.shuffle(self.conv(x)))
