"""The encoder and decoder of TiTok, whose latents have no places in the image.

An Image is Worth 32 Tokens for Reconstruction and Generation, https://arxiv.org/abs/2406.07550.
"""

import torch
from torch import Tensor, nn

from vqf.batch import Size, pair
from vqf.encoders.vit_blocks import PatchSide, Ratio, VisionTransformer, add_positions, init_linear
from vqf.options.ranges import Depth, Dimension, Rate
from vqf.registry import register


def patch_grid(image_size: int | Size, patch_size: int) -> Size:
    """Rows and columns of the patches of an image.

    Raises:
        ValueError: If `patch_size` does not divide the sides.
    """
    height, width = pair(image_size)
    if height % patch_size or width % patch_size:
        raise ValueError(f"patch_size={patch_size} must divide the sides of the images, {height} x {width} pixels")
    return height // patch_size, width // patch_size


@register("encoder", "titok")
class TiTokEncoder(nn.Module):
    """TiTok's encoder, https://arxiv.org/abs/2406.07550: a transformer over patches and learned queries, z = E(P, L).

    Good for the fewest tokens an image, 32 to 128, and so the quickest prior. Latents have no places: nothing crops,
    completes or slides over their grid, and images have one size. Details are lost: where they count, take `vit` or
    `conv`. The paper trains on the tokens of another tokenizer first; here pixels are the target from the start. Its
    sizes are (width, layers, heads) = (512, 8, 8), (768, 12, 12) and (1024, 24, 16).

    Args:
        in_channels: Channels of the images.
        image_size: Size of the images.
        dim: Channels of the latents (D).
        num_latents: Number of queries, and so of latents (K).
        patch_size: Side in pixels of a patch.
        width: Channels of the transformer, a multiple of 4 and of `heads`.
        layers: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs, as a multiple of `width`.
        dropout: Rate at both branches of the blocks.
        gradient_checkpointing: Keep only the input of each block for the backward pass, and recompute the block: less
            memory, up to a third more work, the same gradients.
    """

    stride = None

    def __init__(
        self,
        in_channels: int,
        image_size: int | Size,
        *,
        dim: Dimension = 12,
        num_latents: Dimension = 32,
        patch_size: PatchSide = 16,
        width: Dimension = 512,
        layers: Depth = 8,
        heads: Dimension = 8,
        mlp_ratio: Ratio = 4,
        dropout: Rate = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        patch_grid(image_size, patch_size)
        self.dim, self.num_latents = dim, num_latents
        self.patch_embedding = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.queries = nn.Parameter(torch.randn(num_latents, width) * width**-0.5)
        self.transformer = VisionTransformer(width, layers, heads, mlp_ratio * width, dropout, gradient_checkpointing)
        self.head = nn.Linear(width, dim)
        init_linear(self.head)

    def forward(self, images: Tensor) -> Tensor:
        patches = add_positions(self.patch_embedding(images))
        h = self.transformer(torch.cat([patches, self.queries.expand(len(images), -1, -1)], dim=1))
        return self.head(h[:, -self.num_latents :]).transpose(1, 2).unsqueeze(2)


@register("decoder", "titok")
class TiTokDecoder(nn.Module):
    """TiTok's decoder, https://arxiv.org/abs/2406.07550: a transformer over mask tokens and latents, x = D(M, z).

    It takes any number of latents, which are told apart by sines and cosines of their number; in the paper by learned
    positions. Take it with the encoder `titok`.

    Args:
        dim: Channels of the latents (D).
        out_channels: Channels of the images.
        image_size: Size of the images.
        patch_size: Side in pixels of a patch; it need not be the encoder's.
        width: Channels of the transformer, a multiple of 4 and of `heads`.
        layers: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs and of the head, as a multiple of `width`.
        dropout: Rate at both branches of the blocks.
        gradient_checkpointing: Keep only the input of each block for the backward pass, and recompute the block: less
            memory, up to a third more work, the same gradients.
    """

    stride = None

    def __init__(
        self,
        dim: int,
        out_channels: int,
        image_size: int | Size,
        *,
        patch_size: PatchSide = 16,
        width: Dimension = 512,
        layers: Depth = 8,
        heads: Dimension = 8,
        mlp_ratio: Ratio = 4,
        dropout: Rate = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.grid = patch_grid(image_size, patch_size)
        hidden = mlp_ratio * width
        self.embedding = nn.Conv2d(dim, width, 1)
        self.mask_token = nn.Parameter(torch.randn(width, 1, 1) * width**-0.5)
        self.transformer = VisionTransformer(width, layers, heads, hidden, dropout, gradient_checkpointing)
        self.hidden = nn.Linear(width, hidden)
        self.last_layer = nn.ConvTranspose2d(hidden, out_channels, patch_size, stride=patch_size)
        init_linear(self.hidden)

    def features(self, latents: Tensor) -> Tensor:
        masks = add_positions(self.mask_token.expand(len(latents), -1, *self.grid))
        h = self.transformer(torch.cat([masks, add_positions(self.embedding(latents))], dim=1))
        h = torch.tanh(self.hidden(h[:, : masks.shape[1]]))
        return h.transpose(1, 2).unflatten(2, self.grid)

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (B, dim, 1, N) to images, not clamped."""
        return self.last_layer(self.features(latents))
