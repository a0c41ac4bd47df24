"""Keep a part of pictures and draw the rest: completion, section 4.2 of the paper of VQGAN, in- and outpainting."""

import inspect

import torch
from torch import Tensor

from vqf.batch import Batch
from vqf.images import as_colours
from vqf.models.generator import Generator


def complete_tokens(generator: Generator, told: Batch, *, seed: int, first: int = 0, keep: float = 0.5) -> Tensor:
    """Complete pictures that are known by their tokens; returns (B, 3, 3, H, W) as the grid of this pipeline has them.

    The originals, too, are drawn from their codes.
    """
    assert told.tokens is not None
    mask = upper(generator, keep)
    known = told.tokens.masked_fill(~mask.flatten(), -1)
    completed = generator.sample_tokens(told, seed=seed, first=first, known=known)
    whole, drawn = (as_colours(generator.tokenizer.images(each).float()) for each in (told.tokens, completed))
    return torch.stack([whole, whole.masked_fill(~enlarged(mask, generator), 0), drawn], dim=1)


def can_complete(generator: Generator) -> bool:
    """Say whether there is a lower part, and the sampler keeps what is known."""
    return generator.tokenizer.grid[0] > 1 and "known" in inspect.signature(generator.sampler).parameters


def upper(generator: Generator, keep: float) -> Tensor:
    """Return the mask (h, w) of the upper rows of codes: a share of them, but at least one and not all."""
    height, width = generator.tokenizer.grid
    rows = min(max(round(keep * height), 1), height - 1)
    return (torch.arange(height, device=generator.device) < rows)[:, None].expand(height, width)


def enlarged(mask: Tensor, generator: Generator) -> Tensor:
    """Turn a mask of codes into one of pixels."""
    stride = generator.tokenizer.stride
    return mask.repeat_interleave(stride, 0).repeat_interleave(stride, 1)
