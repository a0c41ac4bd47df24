"""The encoder and decoder of ViT-VQGAN, vision transformers.

Vector-quantized Image Modeling with Improved VQGAN, https://arxiv.org/abs/2110.04627.
"""

import torch
from torch import Tensor, nn

from vqf.encoders.vit_blocks import PatchSide, Ratio, TanhHead, VisionTransformer, add_positions, init_linear
from vqf.options.ranges import Depth, Dimension, Rate
from vqf.registry import register


@register("encoder", "vit")
class ViTEncoder(nn.Module):
    """ViT-VQGAN's encoder, https://arxiv.org/abs/2110.04627: patches, transformer, two layers with a tanh.

    Good for speed on accelerators, at strides of 8 and 16, with many images. With few images, or images larger than in
    training, take `conv`: attention is quadratic in the number of cells. Positions are sines and cosines of row and
    column, computed for any grid; those beyond the training size were never trained.

    The paper's sizes are (width, layers, heads) = (512, 8, 8), (768, 12, 12) and (1280, 32, 16), with `dim` equal to
    `width`. The tokenizer projects from there to the codes, of 32 in the paper: `model.quantizer.dim=32`.

    Args:
        in_channels: Channels of the images.
        dim: Channels of the latents.
        patch_size: Side in pixels of a patch: the stride.
        width: Channels of the transformer, a multiple of 4 and of `heads`.
        layers: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs and of the head, as a multiple of `width`.
        dropout: Rate at both branches of the blocks.
        gradient_checkpointing: Keep only the input of each block for the backward pass, and recompute the block: less
            memory, up to a third more work, the same gradients.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dim: Dimension = 512,
        patch_size: PatchSide = 8,
        width: Dimension = 512,
        layers: Depth = 8,
        heads: Dimension = 8,
        mlp_ratio: Ratio = 4,
        dropout: Rate = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.stride = dim, patch_size
        hidden = mlp_ratio * width
        self.patch_embedding = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.transformer = VisionTransformer(width, layers, heads, hidden, dropout, gradient_checkpointing)
        self.head = TanhHead(width, hidden, dim)

    def forward(self, images: Tensor) -> Tensor:
        cells = self.patch_embedding(images)
        latents = self.head(self.transformer(add_positions(cells)))
        return latents.transpose(1, 2).unflatten(2, cells.shape[2:])


@register("decoder", "vit")
class ViTDecoder(nn.Module):
    """ViT-VQGAN's decoder, https://arxiv.org/abs/2110.04627: the encoder mirrored.

    Patches do not overlap and no convolution follows, so early in training the image shows their grid; the losses on
    features and the discriminator remove it. With few steps, or none of these losses, take `conv`. It fits any encoder
    with a stride of `patch_size`.

    Args:
        dim: Channels of the latents.
        out_channels: Channels of the images.
        patch_size: Side in pixels of a patch: the stride.
        width: Channels of the transformer, a multiple of 4 and of `heads`.
        layers: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs and of the head, as a multiple of `width`.
        dropout: Rate at both branches of the blocks.
        gradient_checkpointing: Keep only the input of each block for the backward pass, and recompute the block: less
            memory, up to a third more work, the same gradients.
    """

    def __init__(
        self,
        dim: int,
        out_channels: int,
        *,
        patch_size: PatchSide = 8,
        width: Dimension = 512,
        layers: Depth = 8,
        heads: Dimension = 8,
        mlp_ratio: Ratio = 4,
        dropout: Rate = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.stride = patch_size
        hidden = mlp_ratio * width
        self.embedding = nn.Conv2d(dim, width, 1)
        self.transformer = VisionTransformer(width, layers, heads, hidden, dropout, gradient_checkpointing)
        self.hidden = nn.Linear(width, hidden)
        self.last_layer = nn.ConvTranspose2d(hidden, out_channels, patch_size, stride=patch_size)
        init_linear(self.hidden)

    def features(self, latents: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(self.transformer(add_positions(self.embedding(latents)))))
        return h.transpose(1, 2).unflatten(2, latents.shape[2:])

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (B, dim, h, w) to images, not clamped."""
        return self.last_layer(self.features(latents))
