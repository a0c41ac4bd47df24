"""The convolutional encoder and decoder of VQGAN.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841. Published weights need group
norm with eps 1e-6, downsampling padded on the right and bottom only, and attention at *nominal* resolutions.
"""

from collections.abc import Sequence
from typing import Annotated, cast

import torch.nn.functional as F
from annotated_types import Interval, Len
from torch import Tensor, nn

from vqf.batch import Size, pair
from vqf.encoders.conv_blocks import (
    Downsample,
    Level,
    PixelShuffleUpsample,
    Upsample,
    apply_blocks,
    group_norm,
    mid_block,
)
from vqf.options.ranges import Depth, Dimension, PositiveInt, Rate
from vqf.registry import register

Multipliers = Annotated[Sequence[Annotated[int, Interval(ge=1, le=256)]], Len(1, 16)]
PatchSize = Annotated[int, Interval(ge=1, le=64)]


@register("encoder", "conv")
class ConvEncoder(nn.Module):
    """VQGAN's encoder, https://arxiv.org/abs/2012.09841.

    Args:
        in_channels: Channels of the images.
        image_size: Nominal side of the images in pixels, by which `attention` is placed.
        dim: Channels of the latents (z_channels).
        channels: Width at full resolution (ch).
        multipliers: Width of each resolution as a multiple of `channels` (ch_mult). Every level but the last halves
            the sides: stride = patch_size * 2^(len - 1).
        blocks: Residual blocks a resolution (num_res_blocks).
        attention: Sides in pixels of the resolutions with attention (attn_resolutions).
        middle_attention: Whether the blocks next to the codebook have attention.
        dropout: Rate inside the residual blocks.
        patch_size: Pixel-unshuffle patches of this side into channels first: 1 / patch_size² of the work. 1 does not.
        gradient_checkpointing: Keep only the input of each block for the backward pass, and recompute the block: less
            memory, up to a third more work, the same gradients.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int | Size,
        *,
        dim: Dimension = 256,
        channels: Dimension = 128,
        multipliers: Multipliers = (1, 1, 2, 2, 4),
        blocks: Depth = 2,
        attention: Sequence[PositiveInt] = (16,),
        middle_attention: bool = True,
        dropout: Rate = 0.0,
        patch_size: PatchSize = 1,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.gradient_checkpointing = dim, gradient_checkpointing
        nominal = min(pair(image_size))  # so the weights of a square run of this size fit
        self.stride = patch_size * 2 ** (len(multipliers) - 1)
        widths = [channels * m for m in multipliers]
        self.unshuffle = nn.PixelUnshuffle(patch_size) if patch_size > 1 else nn.Identity()
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            attends = nominal // (patch_size * 2**i) in attention
            level = Level(widths[i - 1] if i else channels, width, blocks, attends, dropout, gradient_checkpointing)
            if i + 1 < len(widths):
                level.resample = Downsample(width)
            self.down.append(level)
        self.mid = mid_block(widths[-1], dropout, middle_attention)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], dim, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.global_features(self.local_features(images))

    def local_features(self, images: Tensor) -> Tensor:
        h = self.conv_in(self.unshuffle(images))
        for level in self.down[:-1]:
            h = level(h)
        return h

    def global_features(self, cells: Tensor) -> Tensor:
        h = apply_blocks(self.mid, self.down[-1](cells), self.gradient_checkpointing)
        return self.conv_out(F.silu(self.norm_out(h)))


@register("decoder", "conv")
class ConvDecoder(nn.Module):
    """VQGAN's decoder, https://arxiv.org/abs/2012.09841: the encoder mirrored, with one more block a resolution.

    Args:
        dim: Channels of the latents.
        out_channels: Channels of the images.
        image_size: Nominal side of the images in pixels, by which `attention` is placed.
        channels: Width at full resolution (ch).
        multipliers: Width of each resolution, from full resolution down, as a multiple of `channels` (ch_mult).
        blocks: Residual blocks a resolution, without the extra one.
        attention: Sides in pixels of the resolutions with attention (attn_resolutions).
        middle_attention: Whether the blocks next to the codebook have attention.
        dropout: Rate inside the residual blocks.
        patch_size: Pixel-shuffle channels into patches of this side at the end; the encoder's value.
        head_channels: Channels at full resolution after the pixel-shuffle, if `patch_size` is above 1. The last
            convolution maps them to colors.
        gradient_checkpointing: Keep only the input of each block for the backward pass, and recompute the block: less
            memory, up to a third more work, the same gradients.
    """

    def __init__(
        self,
        dim: int,
        out_channels: int,
        image_size: int | Size,
        *,
        channels: Dimension = 128,
        multipliers: Multipliers = (1, 1, 2, 2, 4),
        blocks: Annotated[int, Interval(ge=0, le=1000)] = 2,
        attention: Sequence[PositiveInt] = (16,),
        middle_attention: bool = True,
        dropout: Rate = 0.0,
        patch_size: PatchSize = 1,
        head_channels: Dimension = 16,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        nominal = min(pair(image_size))
        self.stride = patch_size * 2 ** (len(multipliers) - 1)
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = mid_block(widths[-1], dropout, middle_attention)
        # In order of resolution from full down, as in published checkpoints; applied in reverse.
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            attends = nominal // (patch_size * 2**i) in attention
            wider = widths[min(i + 1, len(widths) - 1)]
            level = Level(wider, width, blocks + 1, attends, dropout, gradient_checkpointing)
            if i > 0:
                level.resample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.unfold = PixelShuffleUpsample(widths[0], head_channels, patch_size) if patch_size > 1 else nn.Identity()
        self.last_layer = nn.Conv2d(head_channels if patch_size > 1 else widths[0], out_channels, 3, padding=1)

    def features(self, latents: Tensor) -> Tensor:
        # Not by way of the two methods below: FSDP2 gathers a level's weights when the level itself is called.
        return self._upsample(self._forward_mid(latents), self.up)

    def global_features(self, latents: Tensor) -> Tensor:
        return self._lowest_level.forward_blocks(self._forward_mid(latents))

    def local_features(self, cells: Tensor) -> Tensor:
        return self._upsample(self._lowest_level.resample(cells), self.up[:-1])

    @property
    def _lowest_level(self) -> Level:
        return cast(Level, self.up[-1])

    def _forward_mid(self, latents: Tensor) -> Tensor:
        return apply_blocks(self.mid, self.conv_in(latents), self.gradient_checkpointing)

    def _upsample(self, h: Tensor, levels: nn.ModuleList) -> Tensor:
        for level in reversed(levels):
            h = level(h)
        return self.unfold(F.silu(self.norm_out(h)))

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (B, dim, h, w) to images, not clamped."""
        return self.last_layer(self.features(latents))
