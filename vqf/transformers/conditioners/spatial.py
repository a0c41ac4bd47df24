"""Conditioning on an image, whose indices are the prefix.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841, section 3.2.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqf.batch import Batch, GridPosition, Size
from vqf.errors import UserError
from vqf.options.ranges import PositiveInt, Rate
from vqf.protocols import ImageCodec
from vqf.registry import register
from vqf.tokens.layout import TokenLayout

OpenTokenizer = Callable[[str], ImageCodec]


class _TokenizedConditioner(nn.Module):
    """Base of conditioners whose prefix is the indices of an image.

    Args:
        codec: Encodes the condition.
        layout: Of the sampled image.
        downsample: Factor by which the condition is smaller than the image.
    """

    name: str  # key of the indices in `Batch.condition_indices`
    batch_field: str  # field of a batch that holds the condition images

    def __init__(self, codec: ImageCodec, layout: TokenLayout, downsample: int, dropout: float) -> None:
        super().__init__()
        if not codec.layout.is_raster or codec.layout.codebooks > 1 or codec.layout.stride is None:
            raise UserError(
                f"model.conditioner.{self.name}.run: its tokenizer gives {codec.layout} tokens; a condition needs one "
                "grid of cells with one token each"
            )
        grid, vocab_size = image_grid(layout, self.name), codec.layout.vocab_size
        self.stride, self.size_multiple = layout.stride or 1, codec.layout.stride * downsample
        self.positions = _cell_centers(grid, self.stride, self.size_multiple)
        self.length, self.dropout = len(self.positions), dropout
        self.null_index = vocab_size if dropout else None
        self.vocab_size = vocab_size + bool(dropout)

    def prepare(self, batch: Batch) -> Batch:
        return replace(batch, condition_indices={**batch.condition_indices, self.name: self.encode(batch)})

    def prepare_shifted(self, batch: Batch) -> Batch:
        """Add the indices (B, p, p, h, w) of shifted images, if p = size_multiple / stride is an integer above 1."""
        images, p = getattr(batch, self.batch_field), self.size_multiple // self.stride
        if images is None or p < 2 or self.size_multiple % self.stride:
            return self.prepare(batch)
        shifts = []
        for i, j in itertools.product(range(p), repeat=2):
            down, right = i * self.stride, j * self.stride
            # Padded to the same size, so that the encoder works as on the unshifted image. No window reads the padding.
            shifted = F.pad(images[..., down:, right:], (0, right, 0, down), mode="replicate")
            shifts.append(self.encode(self._with_images(batch, shifted)))
        indices = rearrange(shifts, "(p q) b h w -> b p q h w", p=p)
        return replace(batch, condition_indices={**batch.condition_indices, self.name: indices})

    def forward(self, batch: Batch) -> Tensor:
        if self.name not in batch.condition_indices:
            batch = self.prepare(batch)
        prefix = rearrange(batch.condition_indices[self.name], "b h w -> b (h w)")
        if prefix.shape[1] != self.length:
            raise UserError(f"the condition has {prefix.shape[1]} tokens, the prior was trained with {self.length}")
        return prefix

    def null_prefix(self, batch: Batch) -> Tensor | None:
        if self.null_index is None:
            return None
        return torch.full((len(batch), self.length), self.null_index, device=batch.any_field.device)

    def _with_images(self, batch: Batch, images: Tensor) -> Batch:
        return replace(batch, images=images) if self.batch_field == "images" else replace(batch, conditions=images)

    def encode(self, batch: Batch) -> Tensor:
        raise NotImplementedError


@register("conditioner", "spatial")
class SpatialConditioner(_TokenizedConditioner):
    """A condition map of the image, such as depth or classes, encoded by its own tokenizer.

    Args:
        run: The run of the map's tokenizer (`pipeline=stage1 target=condition`). Required, except that `pipeline=full`
            trains one.
        downsample: Factor by which the map is reduced before it is encoded: fewer prefix tokens
            (`downsample_cond_size` of taming-transformers).
        dropout: Fraction of the maps that training drops, for guidance.
    """

    name = "spatial"
    batch_field = "conditions"

    def __init__(
        self,
        layout: TokenLayout,
        open_tokenizer: OpenTokenizer,
        *,
        run: str | None = None,
        downsample: PositiveInt = 1,
        dropout: Rate = 0.0,
    ) -> None:
        if run is None:
            raise UserError(
                "model.conditioner.spatial.run: give the run of the condition map's tokenizer, trained by "
                "python -m vqf.run pipeline=stage1 target=condition; pipeline=full trains one by itself"
            )
        codec = open_tokenizer(run)
        super().__init__(codec, layout, downsample, dropout)
        self.tokenizer, self.downsample, self.channels = codec, downsample, codec.channels

    def encode(self, batch: Batch) -> Tensor:
        if batch.conditions is None:
            raise UserError("conditioner 'spatial': the data has no condition maps; choose data=pairs or data=earth")
        return self.tokenizer.encode(_downsample(batch.conditions, self.downsample, "nearest"))

    def render(self, batch: Batch) -> Tensor:
        return self.show(self.tokenizer.decode(batch.condition_indices[self.name]))

    def show(self, images: Tensor) -> Tensor:
        return self.tokenizer.to_rgb(images)


@register("conditioner", "image")
class ImageConditioner(_TokenizedConditioner):
    """A low-resolution view of the image itself, for super-resolution, or its edges.

    Args:
        view: `low_resolution`, or `edges`, the magnitude of the Sobel gradient.
        factor: Factor by which the sides of the view are reduced.
        run: The run of the tokenizer that encodes the view; by default the tokenizer of the images.
        dropout: Fraction of the views that training drops, for guidance.
    """

    name = "image"
    batch_field = "images"

    def __init__(
        self,
        layout: TokenLayout,
        tokenizer: ImageCodec,
        open_tokenizer: OpenTokenizer,
        *,
        view: Literal["low_resolution", "edges"] = "low_resolution",
        factor: PositiveInt = 4,
        run: str | None = None,
        dropout: Rate = 0.0,
    ) -> None:
        codec = tokenizer if run is None else open_tokenizer(run)
        super().__init__(codec, layout, factor, dropout)
        # A list hides the images' tokenizer from nn.Module: its weights belong to the generator, not to the state here.
        self.shared_tokenizer, self.tokenizer = [tokenizer], None if run is None else codec
        self.view, self.factor, self.channels = view, factor, tokenizer.channels

    @property
    def codec(self) -> ImageCodec:
        return self.tokenizer or self.shared_tokenizer[0]

    def encode(self, batch: Batch) -> Tensor:
        if batch.images is None:
            raise UserError("conditioner 'image' needs an image; pass one with condition=image.png")
        return self.codec.encode(self.make_view(batch.images))

    def make_view(self, images: Tensor) -> Tensor:
        return _downsample(sobel_edges(images) if self.view == "edges" else images, self.factor, "area")

    def render(self, batch: Batch) -> Tensor:
        """The view, decoded and enlarged to the size of the images."""
        view = self.codec.decode(batch.condition_indices[self.name])
        return self.show(F.interpolate(view, scale_factor=float(self.factor), mode="nearest"))

    def show(self, images: Tensor) -> Tensor:
        return self.codec.to_rgb(images)


def sobel_edges(images: Tensor) -> Tensor:
    """Magnitude of the Sobel gradient of images (B, C, H, W), both in [-1, 1]."""
    gray = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).to(gray) / 8
    gradient = F.conv2d(gray, torch.stack([sobel, sobel.T])[:, None])
    strength = gradient.norm(dim=1, keepdim=True).clamp(max=1)  # 1: from -1 to 1 over two pixels
    return (strength * 2 - 1).expand_as(images)


def image_grid(layout: TokenLayout, name: str) -> Size:
    """The grid of an image's cells.

    Raises:
        UserError: If they have no places in the image; the conditioner `name` needs them.
    """
    if layout.grid is None:
        raise UserError(
            f"model.conditioner.{name}: needs to know where tokens are, and the {layout.length} tokens of this "
            "tokenizer have no places in the image; choose model/conditioner=none or label"
        )
    return layout.grid


def _cell_centers(grid: Size, stride: int, other: int) -> list[GridPosition]:
    """Centers of the cells of stride `other`, in cells of stride `stride`: with 32 and 16, of rows 0 and 1 row 0.5."""
    sides = [side * stride for side in grid]
    if any(side % other for side in sides):
        raise ValueError(f"a condition of {sides[0]} x {sides[1]} pixels does not divide into cells of {other} pixels")
    rows, columns = ([((k + 0.5) * other / stride) - 0.5 for k in range(side // other)] for side in sides)
    return list(itertools.product(rows, columns))


def _downsample(images: Tensor, factor: int, mode: str) -> Tensor:
    if factor == 1:
        return images
    return F.interpolate(images, size=(images.shape[2] // factor, images.shape[3] // factor), mode=mode)
