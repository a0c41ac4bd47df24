"""Conditions that say something about every place of a picture.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841, section 3.2: a map is
turned into codes by a tokenizer of its own, and those are put in front of the codes of the picture.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from vqf.batch import Batch, Size
from vqf.registry import register
from vqf.transformers.conditioners.spatial import _centres


@register("conditioner", "coordinates")
class Coordinates(nn.Module):
    """Where in the whole picture every code stands; a crop, and a window, thus knows what it is a part of.

    `CoordStage` of taming-transformers, with rows and columns that no picture size mixes up.

    Args:
        rows: Steps that the height of the whole picture is divided into; 1 tells nothing of it.
        columns: Steps that its width is divided into.
    """

    field = "places"

    def __init__(self, grid: Size, *, rows: int = 32, columns: int = 32) -> None:
        super().__init__()
        if min(rows, columns) < 1:
            raise ValueError(f"rows and columns must be at least 1, not {rows} and {columns}")
        self.grid, self.bins = grid, (rows, columns)
        self.places = _centres(grid, 1, 1)
        self.length, self.vocab_size = len(self.places), rows * columns

    def forward(self, batch: Batch) -> Tensor:
        """Return (B, h * w): row step times `columns`, plus column step, of the centre of every code."""
        places = batch.shown().to(torch.float32)
        rows, columns = (self._steps(places[:, i], places[:, i + 2], self.grid[i], self.bins[i]) for i in (0, 1))
        return rearrange(rows[:, :, None] * self.bins[1] + columns[:, None, :], "b h w -> b (h w)")

    @staticmethod
    def _steps(first: Tensor, last: Tensor, count: int, bins: int) -> Tensor:
        centres = (torch.arange(count, device=first.device) + 0.5) / count
        shares = first[:, None] + (last - first)[:, None] * centres
        return (shares * bins).long().clamp(0, bins - 1)
