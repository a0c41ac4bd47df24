"""Completion of images from their upper rows of codes.

VQGAN, https://arxiv.org/abs/2012.09841, section 4.2.
"""

import torch
from torch import Tensor

from vqf.batch import Batch
from vqf.models.generator import Generator
from vqf.models.sample_request import check_raster


def complete_tokens(generator: Generator, batch: Batch, *, seed: int, first: int = 0, keep: float = 0.5) -> Tensor:
    """Sample all but the upper rows of cached tokens.

    Returns (B, 3, 3, H, W) in [-1, 1]: decoded originals, their kept pixels on gray, completions.
    """
    assert batch.tokens is not None
    mask = upper_rows_mask(generator, keep)
    tokenizer = generator.tokenizer
    known = batch.tokens.masked_fill(~tokenizer.layout.cells_to_tokens(mask), -1)
    completed_tokens = generator.sample_tokens(batch, seed=seed, first=first, known=known)
    originals, completed = (
        tokenizer.to_rgb(tokenizer.decode_tokens(tokens).float()) for tokens in (batch.tokens, completed_tokens)
    )
    return torch.stack([originals, originals.masked_fill(~mask_to_pixels(mask, generator), 0), completed], dim=1)


def can_complete(generator: Generator) -> bool:
    """Tell whether upper rows can be completed."""
    layout = generator.tokenizer.layout
    return layout.is_raster and layout.scales[0][0] > 1 and generator.sampler.keeps_known


def upper_rows_mask(generator: Generator, keep: float) -> Tensor:
    """Return the mask (h, w) of a fraction `keep` of the rows: at least one, not all.

    Raises:
        UserError: If the tokens are not those of one grid.
    """
    (height, width), _ = check_raster(generator.tokenizer.layout, "keep")
    rows = min(max(round(keep * height), 1), height - 1)
    return (torch.arange(height, device=generator.device) < rows)[:, None].expand(height, width)


def mask_to_pixels(mask: Tensor, generator: Generator) -> Tensor:
    """Upsample a mask of codes (h, w) to pixels (H, W)."""
    _, stride = check_raster(generator.tokenizer.layout, "mask")
    return mask.repeat_interleave(stride, 0).repeat_interleave(stride, 1)
