"""The convolutional encoder and decoder without attention of MaskGIT and MAGVIT-2.

Language Model Beats Diffusion: Tokenizer is Key to Visual Generation, https://arxiv.org/abs/2310.05737, the case of one
image, on the tokenizer of MaskGIT, https://arxiv.org/abs/2202.04200.
"""

from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from vqf.encoders.conv import Multipliers
from vqf.encoders.conv_blocks import Level, Upsample, apply_blocks, group_norm, mid_block
from vqf.options.ranges import Depth, Dimension, Rate
from vqf.registry import register


@register("encoder", "magvit")
class MagvitEncoder(nn.Module):
    """The encoder of MaskGIT and MAGVIT-2, https://arxiv.org/abs/2310.05737: no attention, average pooling.

    Good for any size and aspect, since no layer but the group norms sees the full image, and as the encoder of `fsq`
    and other quantizers without a codebook. Where the global arrangement matters more than the texture, as for faces at
    stride 16, take `conv`.

    Args:
        in_channels: Channels of the images.
        dim: Channels of the latents.
        channels: Width at full resolution.
        multipliers: Width of each resolution as a multiple of `channels`. Every level but the last halves the sides:
            stride = 2^(len - 1).
        blocks: Residual blocks a resolution; MAGVIT-2 has 4, MaskGIT 2.
        dropout: Rate inside the residual blocks; 0 in the papers.
        gradient_checkpointing: Keep only the input of each block for the backward pass, and recompute the block: less
            memory, up to a third more work, the same gradients.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dim: Dimension = 256,
        channels: Dimension = 128,
        multipliers: Multipliers = (1, 1, 2, 2, 4),
        blocks: Depth = 2,
        dropout: Rate = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.gradient_checkpointing = dim, gradient_checkpointing
        self.stride = 2 ** (len(multipliers) - 1)
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[i - 1] if i else channels, width, blocks, False, dropout, gradient_checkpointing)
            if i + 1 < len(widths):
                level.resample = nn.AvgPool2d(2)
            self.down.append(level)
        self.mid = mid_block(widths[-1], dropout, attention=False)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.global_features(self.local_features(images))

    def local_features(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.down[:-1]:
            h = level(h)
        return h

    def global_features(self, cells: Tensor) -> Tensor:
        h = apply_blocks(self.mid, self.down[-1](cells), self.gradient_checkpointing)
        return self.conv_out(F.silu(self.norm_out(h)))


class DepthToSpace(nn.Module):
    """Doubles both sides: a convolution to four times the channels, then a pixel-shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


UPSAMPLING = {"depth_to_space": DepthToSpace, "nearest": Upsample}


@register("decoder", "magvit")
class MagvitDecoder(nn.Module):
    """The decoder of MaskGIT and MAGVIT-2, https://arxiv.org/abs/2310.05737: no attention, depth to space.

    Good for decoding large images in tiles, since no layer but the group norms sees the full image. MAGVIT-2 also gives
    the latents to its group norms; here they are the decoder's input alone. Where the global arrangement matters, take
    `conv`.

    Args:
        dim: Channels of the latents.
        out_channels: Channels of the images.
        channels: Width at full resolution.
        multipliers: Width of each resolution, from full resolution down, as a multiple of `channels`.
        blocks: Residual blocks a resolution; MAGVIT-2 has 4, MaskGIT 2.
        upsample: How sides are doubled: "depth_to_space" as MAGVIT-2, or "nearest" as MaskGIT, with a quarter of the
            weights there.
        dropout: Rate inside the residual blocks; 0 in the papers.
        gradient_checkpointing: Keep only the input of each block for the backward pass, and recompute the block: less
            memory, up to a third more work, the same gradients.
    """

    def __init__(
        self,
        dim: int,
        out_channels: int,
        *,
        channels: Dimension = 128,
        multipliers: Multipliers = (1, 1, 2, 2, 4),
        blocks: Depth = 2,
        upsample: Literal["depth_to_space", "nearest"] = "depth_to_space",
        dropout: Rate = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.stride = 2 ** (len(multipliers) - 1)
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = mid_block(widths[-1], dropout, attention=False)
        self.up = nn.ModuleList()  # in the order in which they are applied
        for i in reversed(range(len(widths))):
            wider = widths[min(i + 1, len(widths) - 1)]
            level = Level(wider, widths[i], blocks, False, dropout, gradient_checkpointing)
            if i > 0:
                level.resample = UPSAMPLING[upsample](widths[i])
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.last_layer = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def features(self, latents: Tensor) -> Tensor:
        # Not by way of the two methods below: FSDP2 gathers a level's weights when the level itself is called.
        return self._upsample(self._forward_mid(latents), self.up)

    def global_features(self, latents: Tensor) -> Tensor:
        return self._lowest_level.forward_blocks(self._forward_mid(latents))

    def local_features(self, cells: Tensor) -> Tensor:
        return self._upsample(self._lowest_level.resample(cells), self.up[1:])

    @property
    def _lowest_level(self) -> Level:
        return cast(Level, self.up[0])

    def _forward_mid(self, latents: Tensor) -> Tensor:
        return apply_blocks(self.mid, self.conv_in(latents), self.gradient_checkpointing)

    def _upsample(self, h: Tensor, levels: nn.ModuleList) -> Tensor:
        for level in levels:
            h = level(h)
        return F.silu(self.norm_out(h))

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (B, dim, h, w) to images, not clamped."""
        return self.last_layer(self.features(latents))
