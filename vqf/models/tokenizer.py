"""The tokenizer of stage 1: images to indices and back."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vqf.batch import Size, pair
from vqf.errors import UserError
from vqf.hashing import sha256_of_tensors
from vqf.images import to_rgb
from vqf.models.inputs import check_codes, check_images, check_indices, check_size, check_tokens, whole_number
from vqf.models.precision import lookup_upcast, quantize_upcast
from vqf.models.tiled_decoding import MAX_GLOBAL_CELLS, GlobalGroupNorm, decode_tiles
from vqf.protocols import Decoder, Encoder, Layered, Quantized, Quantizer, TiledDecoding, Unplaced
from vqf.registry import build
from vqf.tokens.layout import TokenLayout

# Cells. A quarter of the overlap is wider than what the conv decoder sees beyond a border: seams stay below 1/255.
TILE_OVERLAP = 16

Output = Literal["image", "logits"]


@dataclass
class TokenizerOutput:
    """The output of a tokenizer in training."""

    reconstructions: Tensor  # (B, C, H, W)
    features: Tensor  # input of the decoder's last layer, for the adaptive weight
    quantized: Quantized


class Tokenizer(nn.Module):
    """Encoder, projection, quantizer, projection, decoder.

    The projections (quant_conv, post_quant_conv) map `encoder.dim` to `quantizer.dim` and back.

    Args:
        output: What the decoder gives: colors in [-1, 1], or logits of the classes of a label map.
        projection: Kernel size of the convolutions around the quantizer; None for no convolutions.

    Raises:
        ValueError: If there is no projection, and the dimensions differ.
    """

    def __init__(
        self,
        encoder: Encoder,
        quantizer: Quantizer,
        decoder: Decoder,
        image_size: Size,
        channels: int = 3,
        *,
        output: Output = "image",
        projection: int | None = 1,
    ) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.quant_conv = _project(encoder.dim, quantizer.dim, projection)
        self.post_quant_conv = _project(quantizer.dim, encoder.dim, projection)
        self.image_size, self.channels, self.output = image_size, channels, output
        self.stride = encoder.stride
        self.layout = self.layout_of(_latent_grid(encoder, image_size))

    def layout_of(self, grid: Size) -> TokenLayout:
        """The layout of the tokens of a grid of latents."""
        if isinstance(self.quantizer, Layered):
            return self.quantizer.layout(grid, self.stride)
        return TokenLayout((grid,), (self.quantizer.vocab_size,), self.stride)

    @property
    def last_layer(self) -> nn.Module:
        return self.decoder.last_layer

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct images (B, C, H, W), not clamped."""
        quantized = self.quantize(images)
        features = self.decoder.features(self.post_quant_conv(quantized.latents))
        return TokenizerOutput(self.decoder.last_layer(features), features, quantized)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def quantize(self, images: Tensor) -> Quantized:
        return self.quantize_latents(self.encoder(images))

    def quantize_latents(self, latents: Tensor) -> Quantized:
        """Quantize the encoder's output (B, dim, h, w)."""
        return quantize_upcast(self.quantizer, self.quant_conv(latents))

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] to indices, in the quantizer's shape: (B, h, w) with one codebook.

        Raises:
            UserError: If shape, type or values are wrong, or the stride does not divide the sides.
        """
        images = self.check_images(images)
        if not len(images):  # few layers take empty batches
            return self.encode_unchecked(images.new_zeros(1, *images.shape[1:]))[:0]
        return self.encode_unchecked(images)

    @torch.no_grad()
    def encode_unchecked(self, images: Tensor) -> Tensor:
        """`encode` without checks, for which the host would wait for a GPU."""
        return self.quantize(images.to(self.device, self.dtype)).indices

    def check_images(self, images: Tensor) -> Tensor:
        """Return images as they are if `encode` takes them.

        Raises:
            UserError: As `encode`.
        """
        images = check_images(images, self.channels)
        check_size(images.shape[2], images.shape[3], self.stride, self.image_size)
        return images

    def decode(self, indices: Tensor, tile: int | None = None) -> Tensor:
        """Decode indices to images (B, C, h * stride, w * stride), in [-1, 1] unless they are logits.

        Args:
            tile: Decode at most so many cells per side at once. Blended tiles differ from one pass by less than one
                level of 8 bits. Cells without places in the image are decoded at once.

        Raises:
            UserError: If shape or type are wrong, or a code is none of its codebook.
        """
        indices = check_codes(check_indices(indices, self.layout), self.layout, "indices")
        return self.decode_unchecked(indices, None if tile is None else whole_number("tile", tile))

    @torch.no_grad()
    def decode_unchecked(self, indices: Tensor, tile: int | None = None) -> Tensor:
        """`decode` of int64 without checks."""
        latents = self.post_quant_conv(lookup_upcast(self.quantizer, indices.to(self.device)).to(self.dtype))
        if tile is None or self.stride is None or max(latents.shape[2:]) <= tile:
            images = self.decoder(latents)
        else:
            images = self._decode_tiled(latents, self.stride, tile, min(max(tile // 4, TILE_OVERLAP), tile // 2))
        return images if self.output == "logits" else images.clamp(-1, 1)

    def _decode_tiled(self, cells: Tensor, stride: int, tile: int, overlap: int) -> Tensor:
        decoder, decode = self.decoder, cast(Callable[[Tensor], Tensor], self.decoder)
        # Attention sees the full image, at the resolution of its cells.
        if isinstance(decoder, TiledDecoding) and cells.shape[2:].numel() <= MAX_GLOBAL_CELLS:
            cells, decode = decoder.global_features(cells), _local_layers(decoder)
        norms, sizes = GlobalGroupNorm(self), (stride, tile, overlap)
        for passes in itertools.count(1):
            with norms.collecting():
                decode_tiles(decode, cells, *sizes, set_weight=norms.set_weight)
            if norms.converged(passes):
                break
        with norms.frozen():
            return decode_tiles(decode, cells, *sizes)

    def encode_tokens(self, images: Tensor) -> Tensor:
        """`encode` to tokens (B, T)."""
        return self.layout.flatten(self.encode(images))

    def decode_tokens(self, tokens: Tensor, layout: TokenLayout | None = None, tile: int | None = None) -> Tensor:
        """`decode` of tokens (B, T); `layout` is that of images of another size than in training."""
        layout = layout or self.layout
        tokens = check_codes(check_tokens(tokens, layout), layout, "tokens")
        return self.decode_unchecked(layout.unflatten(tokens), None if tile is None else whole_number("tile", tile))

    def to_rgb(self, images: Tensor) -> Tensor:
        """Show images, or logits or maps of classes, as colors (B, 3, H, W) in [-1, 1]."""
        return to_rgb(images, is_class_map=self.output == "logits")

    def fingerprint(self) -> str:
        """Hash of the weights, for which alone tokens are valid."""
        return sha256_of_tensors(self.state_dict())[:16]


def build_tokenizer(
    model: DictConfig, image_size: int | Size, channels: int = 3, output: Output = "image"
) -> Tokenizer:
    """Build a tokenizer from the nodes `encoder`, `quantizer`, `decoder` and `projection` of a config.

    Raises:
        UserError: If the stride does not divide the image size, or the strides or dimensions differ.
    """
    size = pair(image_size)
    encoder = build("encoder", model.encoder, in_channels=channels, image_size=size)
    if encoder.stride is not None and (size[0] % encoder.stride or size[1] % encoder.stride):
        nearest = max(round(size[0] / encoder.stride), 1) * encoder.stride
        raise UserError(
            f"image_size={_format_size(size)}: the stride {encoder.stride} of encoder '{model.encoder.name}' must "
            f"divide it; the nearest that fits is image_size={nearest}"
        )
    decoder = build("decoder", model.decoder, dim=encoder.dim, out_channels=channels, image_size=size)
    _check_pair(model, encoder.stride, decoder.stride)
    quantizer = build("quantizer", model.quantizer)
    projection = model.get("projection", 1)
    if projection is None and encoder.dim != quantizer.dim:
        raise UserError(
            f"model.projection=null: the encoder has {encoder.dim} channels, the quantizer {quantizer.dim}; "
            "set model.encoder.dim or model.quantizer.dim, or model.projection=1"
        )
    if projection not in (None, 1, 3):
        raise UserError(f"model.projection={projection}: must be 1 or 3, the kernel size of a convolution, or null")
    try:
        return Tokenizer(encoder, quantizer, decoder, size, channels, output=output, projection=projection)
    except ValueError as error:  # a quantizer that cannot lay out this grid
        raise UserError(f"model.quantizer: '{model.quantizer.name}': {error}") from error


def _check_pair(model: DictConfig, encoder_stride: int | None, decoder_stride: int | None) -> None:
    if encoder_stride == decoder_stride:
        return
    names = f"encoder '{model.encoder.name}' and decoder '{model.decoder.name}'"
    if encoder_stride is None or decoder_stride is None:
        raise UserError(f"model.decoder: of {names} one knows the places of its latents, the other does not")
    raise UserError(
        f"model.decoder: decoder '{model.decoder.name}' enlarges by {decoder_stride}, encoder "
        f"'{model.encoder.name}' shrinks by {encoder_stride}; give both the same {_stride_options(model)}"
    )


def _stride_options(model: DictConfig) -> str:
    """The options of both that can decide the stride, such as multipliers and patch_size."""
    shared = [key for key in model.encoder if key in model.decoder and key in ("multipliers", "patch_size", "stride")]
    return " and ".join(shared) or "stride"


def _latent_grid(encoder: Encoder, image_size: Size) -> Size:
    if encoder.stride is not None:
        return image_size[0] // encoder.stride, image_size[1] // encoder.stride
    assert isinstance(encoder, Unplaced), "an encoder with stride None has the member num_latents"
    return 1, encoder.num_latents


def _project(source: int, target: int, kernel: int | None) -> nn.Module:
    return nn.Identity() if kernel is None else nn.Conv2d(source, target, kernel, padding=kernel // 2)


def _local_layers(decoder: TiledDecoding) -> Callable[[Tensor], Tensor]:
    return lambda cells: decoder.last_layer(decoder.local_features(cells))


def _format_size(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"
