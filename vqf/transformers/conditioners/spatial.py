"""Conditions that say something about every place of an image.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841, section 3.2: a map is
turned into codes by a tokenizer of its own, and those are put in front of the codes of the image.
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
from vqf.protocols import ImageCodec
from vqf.registry import register

OpenTokenizer = Callable[[str], ImageCodec]


class _TokenizedConditioner(nn.Module):
    """What conditioners share that put the codes of some image in front."""

    name: str  # under which a batch keeps the codes
    batch_field: str  # of the batch, that has the images
    size_multiple: int  # pixels of a code

    def __init__(self, vocab_size: int, grid: Size, stride: int, size_multiple: int, dropout: float) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {dropout}")
        self.positions, self.stride, self.size_multiple = (
            _cell_centers(grid, stride, size_multiple),
            stride,
            size_multiple,
        )
        self.length, self.dropout = len(self.positions), dropout
        self.null_index = vocab_size if dropout else None
        self.vocab_size = vocab_size + bool(dropout)

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with the codes (B, h, w) of its images."""
        return replace(batch, condition_indices={**batch.condition_indices, self.name: self.encode(batch)})

    def prepare_shifted(self, batch: Batch) -> Batch:
        """Return the batch with the codes (B, p, p, h, w) of its images, p codes of the image being one of these.

        [:, i, j] are those without the first i rows and j columns of the image's codes, for windows that start there.
        One without a whole p has nothing between its codes that fits, and is prepared as it stands.
        """
        images, steps = getattr(batch, self.batch_field), self.size_multiple // self.stride
        if images is None or steps < 2 or self.size_multiple % self.stride:
            return self.prepare(batch)
        every = []
        for i, j in itertools.product(range(steps), repeat=2):
            down, right = i * self.stride, j * self.stride
            # As large as before, so that an encoder works as on the whole; no window reads the codes of what is added.
            shifted = F.pad(images[..., down:, right:], (0, right, 0, down), mode="replicate")
            every.append(self.encode(replace(batch, **{self.batch_field: shifted})))  # type: ignore[arg-type]
        codes = rearrange(every, "(p q) b h w -> b p q h w", p=steps)
        return replace(batch, condition_indices={**batch.condition_indices, self.name: codes})

    def forward(self, batch: Batch) -> Tensor:
        """Return the codes row by row as (B, M)."""
        if self.name not in batch.condition_indices:
            batch = self.prepare(batch)
        codes = rearrange(batch.condition_indices[self.name], "b h w -> b (h w)")
        if codes.shape[1] != self.length:
            raise UserError(f"the condition has {codes.shape[1]} codes, the prior was trained with {self.length}")
        return codes

    def null_prefix(self, batch: Batch) -> Tensor | None:
        """Return the prefix (B, M) of no condition, or None if the prior has never seen one."""
        if self.null_index is None:
            return None
        return torch.full((len(batch), self.length), self.null_index, device=batch.any_field.device)

    def encode(self, batch: Batch) -> Tensor:
        raise NotImplementedError


@register("conditioner", "spatial")
class SpatialConditioner(_TokenizedConditioner):
    """The codes of a map of the same place, by the map's own tokenizer.

    Args:
        run: The run of the map's tokenizer, of `pipeline=stage1 target=condition`; if null, `pipeline=full` trains one.
        downsample: Shrink the map by this factor before it is encoded: fewer codes in front (`downsample_cond_size` of
            taming-transformers).
        dropout: Share of the maps that training hides, so that guidance works.
    """

    name = "spatial"
    batch_field = "conditions"

    def __init__(
        self,
        grid: Size,
        tokenizer: ImageCodec,
        open_tokenizer: OpenTokenizer,
        *,
        run: str | None = None,
        downsample: int = 1,
        dropout: float = 0.0,
    ) -> None:
        if run is None:
            raise UserError(
                "model.conditioner.spatial.run: a map has a tokenizer of its own; name its run, or let pipeline=full "
                "train it. python -m vqf.run pipeline=stage1 target=condition trains one by itself"
            )
        if downsample < 1:
            raise ValueError(f"downsample must be at least 1, not {downsample}")
        coder = open_tokenizer(run)
        super().__init__(coder.vocab_size, grid, tokenizer.stride, coder.stride * downsample, dropout)
        self.tokenizer, self.downsample, self.channels = coder, downsample, coder.channels

    def encode(self, batch: Batch) -> Tensor:
        """Return the codes (B, h, w) of the maps (B, C, H, W)."""
        if batch.conditions is None:
            raise UserError(
                "conditioner 'spatial': the data has no maps beside its images; data=pairs and data=earth do"
            )
        return self.tokenizer.encode(_downsample(batch.conditions, self.downsample, "nearest"))

    def render(self, batch: Batch) -> Tensor:
        """Draw the maps (B, C, H, W) as their codes keep them."""
        return self.tokenizer.decode(batch.condition_indices[self.name])


@register("conditioner", "image")
class ImageConditioner(_TokenizedConditioner):
    """The codes of a poorer image of the same thing: a smaller one, or its edges.

    Args:
        view: `low_resolution`, or `edges`, the magnitude of the Sobel gradient.
        factor: How many times smaller its sides are.
        run: The run of the tokenizer that encodes it; the images' own by default.
        dropout: Share of the images that training hides, so that guidance works.
    """

    name = "image"
    batch_field = "images"

    def __init__(
        self,
        grid: Size,
        tokenizer: ImageCodec,
        open_tokenizer: OpenTokenizer,
        *,
        view: Literal["low_resolution", "edges"] = "low_resolution",
        factor: int = 4,
        run: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        if factor < 1:
            raise ValueError(f"factor must be at least 1, not {factor}")
        coder = tokenizer if run is None else open_tokenizer(run)
        super().__init__(coder.vocab_size, grid, tokenizer.stride, coder.stride * factor, dropout)
        # In a list, the images' own is no part of this module: its weights are kept elsewhere.
        self.shared_tokenizer, self.tokenizer = [tokenizer], None if run is None else coder
        self.view, self.factor, self.channels = view, factor, tokenizer.channels

    @property
    def codec(self) -> ImageCodec:
        """The tokenizer that encodes what is seen."""
        return self.tokenizer or self.shared_tokenizer[0]

    def encode(self, batch: Batch) -> Tensor:
        """Return the codes (B, h, w) of a view of the images (B, C, H, W)."""
        if batch.images is None:
            raise UserError("conditioner 'image' needs an image to look at; condition=image.png gives one")
        return self.codec.encode(self.make_view(batch.images))

    def make_view(self, images: Tensor) -> Tensor:
        """Return what is told of images (B, C, H, W) in [-1, 1]."""
        return _downsample(sobel_edges(images) if self.view == "edges" else images, self.factor, "area")

    def render(self, batch: Batch) -> Tensor:
        """Draw what is told, as the codes keep it, as large as the images."""
        small = self.codec.decode(batch.condition_indices[self.name])
        return F.interpolate(small, scale_factor=float(self.factor), mode="nearest")


def sobel_edges(images: Tensor) -> Tensor:
    """Return the strength of the edges of images (B, C, H, W) in [-1, 1], in the same range and shape."""
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).to(grey) / 8
    gradient = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None])
    strength = gradient.norm(dim=1, keepdim=True).clamp(max=1)  # the steepest is from -1 to 1 in two pixels
    return (strength * 2 - 1).expand_as(images)


def _cell_centers(grid: Size, stride: int, other: int) -> list[GridPosition]:
    """Return the centres, on a grid of codes of a stride, of the codes of another stride that cover the same pixels."""
    sides = [side * stride for side in grid]
    if any(side % other for side in sides):
        raise ValueError(f"a condition of {sides[0]} x {sides[1]} pixels does not divide into codes of {other} pixels")
    rows, columns = ([((k + 0.5) * other / stride) - 0.5 for k in range(side // other)] for side in sides)
    return list(itertools.product(rows, columns))


def _downsample(images: Tensor, factor: int, mode: str) -> Tensor:
    if factor == 1:
        return images
    return F.interpolate(images, size=(images.shape[2] // factor, images.shape[3] // factor), mode=mode)
