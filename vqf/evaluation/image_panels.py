"""Images of an evaluation for the report."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vqf.batch import Size
from vqf.images import to_rgb
from vqf.protocols import Reconstruction
from vqf.tokens.layout import MAX_COUNTED, TokenLayout

TOP_ERRORS = 8  # images, best and worst each
MAX_MOSAIC_CODES = 1024  # codes in the mosaic: those used most
MOSAIC_COLUMNS = 32
MAX_MOSAIC_ELEMENTS = 2**24  # floats for the mean patches of all codes
MAX_PSNR = 100.0  # dB, shown for identical images


class ImagePanels:
    """Collects images like a metric."""

    def __init__(self, layout: TokenLayout, device: torch.device, top_k: int = TOP_ERRORS) -> None:
        self.has_class_logits = False  # whether images are class maps
        self.best, self.worst = TopErrors(top_k, largest=False), TopErrors(top_k, largest=True)
        # Codes of several codebooks, or of scales, are no patches of their own.
        one_code_a_cell = layout.codebooks == 1 and layout.is_raster and layout.vocab_size <= MAX_COUNTED
        self.code_mosaic = CodeMosaic(layout, device) if one_code_a_cell else None

    def update(self, batch: Reconstruction) -> None:
        self.has_class_logits = batch.images.shape[1] > 3
        errors = per_image_errors(batch)
        pairs = torch.stack([to_rgb(batch.images), to_rgb(batch.reconstructions)], dim=1)
        for top_errors in (self.best, self.worst):
            top_errors.update(errors, pairs)
        if self.code_mosaic is not None:
            self.code_mosaic.update(batch)

    def compute(self) -> dict[str, float]:
        return {}

    def images(self) -> dict[str, Tensor]:
        """Return "best", "worst" and "codes"."""
        images = {name: rearrange(top.pairs, "b two c h w -> (b two) c h w") for name, top in self._extremes().items()}
        mosaic = None if self.code_mosaic is None else self.code_mosaic.render()
        return images if mosaic is None else {**images, "codes": mosaic}

    def details(self) -> dict[str, Any]:
        details: dict[str, Any] = {
            name: {"captions": top.captions(self.has_class_logits)} for name, top in self._extremes().items()
        }
        if self.code_mosaic is not None:
            details["codes"] = {"counts": self.code_mosaic.counts.tolist()}
        return details

    def _extremes(self) -> dict[str, "TopErrors"]:
        return {name: top for name, top in (("best", self.best), ("worst", self.worst)) if top.count}


class TopErrors:
    """The `top_k` images with the most extreme errors."""

    def __init__(self, top_k: int, *, largest: bool) -> None:
        self.top_k, self.largest = top_k, largest
        self.errors, self.pairs = torch.empty(0), torch.empty(0)

    @property
    def count(self) -> int:
        return len(self.errors)

    def update(self, errors: Tensor, pairs: Tensor) -> None:
        self.errors = torch.cat([self.errors.to(errors), errors])
        self.pairs = torch.cat([self.pairs.to(pairs).reshape(-1, *pairs.shape[1:]), pairs])
        order = self.errors.argsort(stable=True, descending=self.largest)[: self.top_k]
        self.errors, self.pairs = self.errors[order], self.pairs[order]

    def captions(self, has_class_logits: bool) -> list[str]:
        if has_class_logits:
            return [f"{100 * value:.1f} % wrong" for value in self.errors.tolist()]
        decibel = (-10 * self.errors.log10()).clamp(max=MAX_PSNR)
        return [f"{value:.1f} dB" for value in decibel.tolist()]


class CodeMosaic:
    """Counts of codes, and the mean reconstruction under each.

    Args:
        layout: One grid of cells and one codebook.
    """

    def __init__(self, layout: TokenLayout, device: torch.device) -> None:
        self.layout = layout
        self.counts = torch.zeros(layout.vocab_size, dtype=torch.int64, device=device)
        self.sums: Tensor | None = None

    def update(self, batch: Reconstruction) -> None:
        self.counts += torch.bincount(batch.tokens.flatten(), minlength=len(self.counts))
        patches = _code_patches(batch, self.layout.scales[0])
        if patches is None or patches.shape[1:].numel() * len(self.counts) > MAX_MOSAIC_ELEMENTS:
            return
        if self.sums is None:
            self.sums = patches.new_zeros(len(self.counts), *patches.shape[1:])
        self.sums.index_add_(0, batch.tokens.flatten(), patches)

    def render(self) -> Tensor | None:
        """Return the mean patches by descending count (1, 3, H, W); None if they are not square."""
        if self.sums is None:
            return None
        order = self.counts.argsort(stable=True, descending=True)[:MAX_MOSAIC_CODES]
        counts = self.counts[order].view(-1, 1, 1, 1)
        patches = (self.sums[order] / counts.clamp(min=1)).where(counts > 0, 1.0)
        columns = min(MOSAIC_COLUMNS, len(patches))
        missing = patches.new_ones(-len(patches) % columns, *patches.shape[1:])
        return rearrange(torch.cat([patches, missing]), "(r k) c h w -> 1 c (r h) (k w)", k=columns)


def per_image_errors(batch: Reconstruction) -> Tensor:
    """Return mean squared errors on [0, 1], or shares of wrong pixels (B,)."""
    if batch.images.shape[1] > 3:
        return (batch.reconstructions.argmax(1) != batch.images.argmax(1)).float().flatten(1).mean(1)
    return ((batch.reconstructions - batch.images).float() / 2).square().flatten(1).mean(1)


def _code_patches(batch: Reconstruction, grid: Size) -> Tensor | None:
    rows, columns = grid
    if batch.tokens.shape[1] != rows * columns:
        return None
    height, width = batch.reconstructions.shape[2:]
    if height % rows or width % columns or height // rows != width // columns:
        return None
    images = to_rgb(batch.reconstructions).float()
    return rearrange(images, "b c (i y) (j x) -> (b i j) c y x", i=rows, j=columns)
