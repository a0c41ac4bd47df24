"""What a page shows of an evaluation: the best and the worst images, and what every code stands for."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vqf.images import to_rgb
from vqf.protocols import Reconstruction

TOP_ERRORS = 8  # images at either end
MAX_MOSAIC_CODES = 1024  # codes in the image of the codebook, those used most
MOSAIC_COLUMNS = 32
MAX_VOCAB = 2**18  # vocabularies beyond are not counted code by code
MAX_MOSAIC_ELEMENTS = 2**24  # numbers that may be kept to say what codes look like
MAX_PSNR = 100.0


class ImagePanels:
    """Looks at reconstructions as a metric does, and keeps images in place of numbers."""

    def __init__(self, vocab_size: int, device: torch.device, top_k: int = TOP_ERRORS) -> None:
        self.has_class_logits = False  # whether the channels are scores of classes
        self.best, self.worst = TopErrors(top_k, largest=False), TopErrors(top_k, largest=True)
        self.code_mosaic = CodeMosaic(vocab_size, device) if vocab_size <= MAX_VOCAB else None

    def update(self, batch: Reconstruction) -> None:
        """Look at a batch."""
        self.has_class_logits = batch.images.shape[1] > 3
        errors = per_image_errors(batch)
        pairs = torch.stack([to_rgb(batch.images), to_rgb(batch.reconstructions)], dim=1)
        for end in (self.best, self.worst):
            end.update(errors, pairs)
        if self.code_mosaic is not None:
            self.code_mosaic.update(batch)

    def compute(self) -> dict[str, float]:
        """Return nothing: it keeps no number."""
        return {}

    def images(self) -> dict[str, Tensor]:
        """Return `best` and `worst`, originals and reconstructions in turn, and `code_mosaic`, one image of them
        all."""
        shown = {name: rearrange(end.pairs, "b two c h w -> (b two) c h w") for name, end in self._extremes().items()}
        mosaic = None if self.code_mosaic is None else self.code_mosaic.render()
        return shown if mosaic is None else {**shown, "codes": mosaic}

    def details(self) -> dict[str, Any]:
        """Return what is written under the images, and how often every code was used."""
        said: dict[str, Any] = {
            name: {"captions": end.captions(self.has_class_logits)} for name, end in self._extremes().items()
        }
        if self.code_mosaic is not None:
            said["codes"] = {"counts": self.code_mosaic.counts.tolist()}
        return said

    def _extremes(self) -> dict[str, "TopErrors"]:
        return {name: end for name, end in (("best", self.best), ("worst", self.worst)) if end.count}


class TopErrors:
    """The images with the largest, or the smallest, errors so far, the most extreme first."""

    def __init__(self, top_k: int, *, largest: bool) -> None:
        self.top_k, self.largest = top_k, largest
        self.errors, self.pairs = torch.empty(0), torch.empty(0)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.errors)

    def update(self, errors: Tensor, pairs: Tensor) -> None:
        """Compare images (B, 2, 3, H, W) of errors (B,) with those that are kept; of equal ones the first stays."""
        self.errors = torch.cat([self.errors.to(errors), errors])
        self.pairs = torch.cat([self.pairs.to(pairs).reshape(-1, *pairs.shape[1:]), pairs])
        order = self.errors.argsort(stable=True, descending=self.largest)[: self.top_k]
        self.errors, self.pairs = self.errors[order], self.pairs[order]

    def captions(self, has_class_logits: bool) -> list[str]:
        """Say how far off each image is: in decibel, or as the share of pixels whose class is wrong."""
        if has_class_logits:
            return [f"{100 * value:.1f} % wrong" for value in self.errors.tolist()]
        decibel = (-10 * self.errors.log10()).clamp(max=MAX_PSNR)
        return [f"{value:.1f} dB" for value in decibel.tolist()]


class CodeMosaic:
    """How often every code was used, and what was drawn where it was."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)
        self.sums: Tensor | None = None

    def update(self, batch: Reconstruction) -> None:
        """Look at a batch; several codebooks of one vocabulary are counted together."""
        self.counts += torch.bincount(batch.indices.flatten(), minlength=len(self.counts))
        cells = _code_patches(batch)
        if cells is None or cells.shape[1:].numel() * len(self.counts) > MAX_MOSAIC_ELEMENTS:
            return
        if self.sums is None:
            self.sums = cells.new_zeros(len(self.counts), *cells.shape[1:])
        books = batch.indices.flatten(3) if batch.indices.ndim > 3 else batch.indices[..., None]
        for book in books.unbind(-1):
            self.sums.index_add_(0, book.flatten(), cells)

    def render(self) -> Tensor | None:
        """Return one image (1, 3, H, W): what was drawn where a code was used, on average, the codes used most first.

        None where codes do not lie on the image as squares do, or nothing was seen. White where a code was not used.
        """
        if self.sums is None:
            return None
        order = self.counts.argsort(stable=True, descending=True)[:MAX_MOSAIC_CODES]
        used = self.counts[order].view(-1, 1, 1, 1)
        cells = (self.sums[order] / used.clamp(min=1)).where(used > 0, 1.0)
        columns = min(MOSAIC_COLUMNS, len(cells))
        missing = cells.new_ones(-len(cells) % columns, *cells.shape[1:])
        return rearrange(torch.cat([cells, missing]), "(r k) c h w -> 1 c (r h) (k w)", k=columns)


def per_image_errors(batch: Reconstruction) -> Tensor:
    """Return the mean squared error of every image (B,), on [0, 1]; of scores, the share of wrong classes."""
    if batch.images.shape[1] > 3:
        return (batch.reconstructions.argmax(1) != batch.images.argmax(1)).float().flatten(1).mean(1)
    return ((batch.reconstructions - batch.images).float() / 2).square().flatten(1).mean(1)


def _code_patches(batch: Reconstruction) -> Tensor | None:
    """Cut reconstructions into what lies under each code, (B h w, 3, s, s); None where that is no square."""
    if batch.indices.ndim < 3:
        return None
    rows, columns = batch.indices.shape[1:3]
    height, width = batch.reconstructions.shape[2:]
    if height % rows or width % columns or height // rows != width // columns:
        return None
    images = to_rgb(batch.reconstructions).float()
    return rearrange(images, "b c (i y) (j x) -> (b i j) c y x", i=rows, j=columns)
