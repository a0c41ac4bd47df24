"""Keep a part of images and draw the rest: completion, section 4.2 of the paper of VQGAN, in- and outpainting."""

import inspect

import torch
from torch import Tensor

from vqf.batch import Batch
from vqf.images import to_rgb
from vqf.models.generator import Generator


def complete_tokens(generator: Generator, batch: Batch, *, seed: int, first: int = 0, keep: float = 0.5) -> Tensor:
    """Complete images that are known by their tokens; returns (B, 3, 3, H, W) as the grid of this pipeline has them.

    The originals, too, are drawn from their codes.
    """
    assert batch.tokens is not None
    mask = upper_rows_mask(generator, keep)
    known = batch.tokens.masked_fill(~mask.flatten(), -1)
    completed = generator.sample_tokens(batch, seed=seed, first=first, known=known)
    whole, drawn = (to_rgb(generator.tokenizer.decode_tokens(each).float()) for each in (batch.tokens, completed))
    return torch.stack([whole, whole.masked_fill(~mask_to_pixels(mask, generator), 0), drawn], dim=1)


def can_complete(generator: Generator) -> bool:
    """Say whether there is a lower part, and the sampler keeps what is known."""
    return generator.tokenizer.grid[0] > 1 and "known" in inspect.signature(generator.sampler).parameters


def upper_rows_mask(generator: Generator, keep: float) -> Tensor:
    """Return the mask (h, w) of the upper rows of codes: a share of them, but at least one and not all."""
    height, width = generator.tokenizer.grid
    rows = min(max(round(keep * height), 1), height - 1)
    return (torch.arange(height, device=generator.device) < rows)[:, None].expand(height, width)


def mask_to_pixels(mask: Tensor, generator: Generator) -> Tensor:
    """Turn a mask of codes into one of pixels."""
    stride = generator.tokenizer.stride
    return mask.repeat_interleave(stride, 0).repeat_interleave(stride, 1)
