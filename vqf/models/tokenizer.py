"""The tokenizer of stage 1: images to indices and back."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor, nn

from vqf.batch import Size, pair
from vqf.errors import UserError
from vqf.hashing import sha256_of_tensors
from vqf.models.tiled_decoding import GlobalGroupNorm, decode_tiles
from vqf.protocols import Decoder, Encoder, Quantized, Quantizer
from vqf.registry import build

# Cells. A quarter of the overlap is wider than what the conv decoder sees beyond a border: seams stay below 1/255.
TILE_OVERLAP = 16


@dataclass
class TokenizerOutput:
    """The output of a tokenizer in training."""

    reconstructions: Tensor  # (B, C, H, W)
    features: Tensor  # input of the decoder's last layer, for the adaptive weight
    quantized: Quantized


class Tokenizer(nn.Module):
    """Encoder, 1x1 convolution, quantizer, 1x1 convolution, decoder.

    The convolutions (quant_conv, post_quant_conv) map `encoder.dim` to `quantizer.dim` and back.
    """

    def __init__(
        self, encoder: Encoder, quantizer: Quantizer, decoder: Decoder, image_size: Size, channels: int = 3
    ) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.quant_conv = nn.Conv2d(encoder.dim, quantizer.dim, 1)
        self.post_quant_conv = nn.Conv2d(quantizer.dim, encoder.dim, 1)
        self.image_size, self.channels = image_size, channels
        self.stride = encoder.stride
        self.vocab_size = quantizer.vocab_size

    @property
    def grid(self) -> Size:
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride

    @property
    def last_layer(self) -> nn.Module:
        return self.decoder.last_layer

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct images (B, C, H, W), not clamped."""
        quantized = self.quantize(images)
        features = self.decoder.features(self.post_quant_conv(quantized.latents))
        return TokenizerOutput(self.decoder.last_layer(features), features, quantized)

    def quantize(self, images: Tensor) -> Quantized:
        latents = self.quant_conv(self.encoder(images))
        # In float32 or better under any autocast: bf16 distances pick other codes.
        with torch.autocast(latents.device.type, enabled=False):
            return self.quantizer(latents.to(torch.promote_types(latents.dtype, torch.float32)))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] to indices (B, h, w).

        Raises:
            ValueError: If the shape is wrong, or the stride does not divide the sides.
        """
        self._check_images(images)
        return self.quantize(images).indices

    @torch.no_grad()
    def decode(self, indices: Tensor, tile: int | None = None) -> Tensor:
        """Decode indices (B, h, w) int64 to images (B, C, h * stride, w * stride).

        Images of 1 and 3 channels are clamped to [-1, 1]; with more channels they are logits of classes.

        Args:
            tile: Decode at most so many cells per side at once. Blended tiles differ from one pass by less than one
                level of 8 bits.
        """
        if tile is None or max(indices.shape[1:3]) <= tile:
            images = self._decode_untiled(indices)
        else:
            images = self._decode_tiled(indices, tile, min(max(tile // 4, TILE_OVERLAP), tile // 2))
        return images.clamp(-1, 1) if self.channels in (1, 3) else images

    def _decode_tiled(self, indices: Tensor, tile: int, overlap: int) -> Tensor:
        cells, decode = self._lookup_latents(indices), cast(Callable[[Tensor], Tensor], self.decoder)
        if hasattr(self.decoder, "global_features"):  # attention sees the full image, at the resolution of its cells
            cells, decode = self.decoder.global_features(cells), self._decode_local
        norms, sizes = GlobalGroupNorm(self), (self.stride, tile, overlap)
        for passes in itertools.count(1):
            with norms.collecting():
                decode_tiles(decode, cells, *sizes, set_weight=norms.set_weight)
            if norms.converged(passes):
                break
        with norms.frozen():
            return decode_tiles(decode, cells, *sizes)

    def _decode_local(self, cells: Tensor) -> Tensor:
        return self.decoder.last_layer(self.decoder.local_features(cells))  # type: ignore[attr-defined]

    def _lookup_latents(self, indices: Tensor) -> Tensor:
        return self.post_quant_conv(self.quantizer.lookup(indices))

    def _decode_untiled(self, indices: Tensor) -> Tensor:
        return self.decoder(self._lookup_latents(indices))

    def encode_tokens(self, images: Tensor) -> Tensor:
        return rearrange(self.encode(images), "b h w -> b (h w)")

    def decode_tokens(self, tokens: Tensor, grid: Size | None = None, tile: int | None = None) -> Tensor:
        height, width = grid or self.grid
        return self.decode(rearrange(tokens, "b (h w) -> b h w", h=height, w=width), tile)

    def fingerprint(self) -> str:
        """Hash of the weights, for which alone tokens are valid."""
        return sha256_of_tensors(self.state_dict())[:16]

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images must be (B, {self.channels}, H, W) in [-1, 1], not {tuple(images.shape)}")
        if images.shape[2] % self.stride or images.shape[3] % self.stride:
            raise ValueError(
                f"image height and width must be multiples of the encoder's stride {self.stride}, "
                f"not {images.shape[2]} x {images.shape[3]}"
            )


def build_tokenizer(model: DictConfig, image_size: int | Size, channels: int = 3) -> Tokenizer:
    """Build a tokenizer from the nodes `encoder`, `quantizer` and `decoder` of a config.

    Raises:
        UserError: If the stride does not divide the image size, or the strides differ.
    """
    size = pair(image_size)
    nominal = min(size)  # it places the attention; so weights of a square run of this size fit
    encoder = build("encoder", model.encoder, in_channels=channels, image_size=nominal)
    if size[0] % encoder.stride or size[1] % encoder.stride:
        nearest = max(round(size[0] / encoder.stride), 1) * encoder.stride
        raise UserError(
            f"image_size={_format_size(size)}: the stride {encoder.stride} of encoder '{model.encoder.name}' must "
            f"divide it; the nearest that fits is image_size={nearest}"
        )
    decoder = build("decoder", model.decoder, dim=encoder.dim, out_channels=channels, image_size=nominal)
    if decoder.stride != encoder.stride:
        raise UserError(
            f"model.decoder: decoder '{model.decoder.name}' enlarges by {decoder.stride}, encoder "
            f"'{model.encoder.name}' shrinks by {encoder.stride}; give both the same multipliers and patch_size"
        )
    return Tokenizer(encoder, build("quantizer", model.quantizer), decoder, size, channels)


def _format_size(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"
