"""Conditions that say something about every place of an image.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841, section 3.2: a map is
turned into codes by a tokenizer of its own, and those are put in front of the codes of the image.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from vqf.batch import Batch, Size
from vqf.registry import register
from vqf.transformers.conditioners.spatial import _cell_centers


@register("conditioner", "coordinates")
class CoordinatesConditioner(nn.Module):
    """Where in the whole image every code stands; a crop, and a window, thus knows what it is a part of.

    `CoordStage` of taming-transformers, with rows and columns that no image size mixes up.

    Args:
        rows: Steps that the height of the whole image is divided into; 1 tells nothing of it.
        columns: Steps that its width is divided into.
    """

    batch_field = "crop_boxes"

    def __init__(self, grid: Size, *, rows: int = 32, columns: int = 32) -> None:
        super().__init__()
        if min(rows, columns) < 1:
            raise ValueError(f"rows and columns must be at least 1, not {rows} and {columns}")
        self.grid, self.bins = grid, (rows, columns)
        self.positions = _cell_centers(grid, 1, 1)
        self.length, self.vocab_size = len(self.positions), rows * columns

    def forward(self, batch: Batch) -> Tensor:
        """Return (B, h * w): row step times `columns`, plus column step, of the centre of every code."""
        places = batch.crop_boxes_or_full().to(torch.float32)
        rows, columns = (self._bin_indices(places[:, i], places[:, i + 2], self.grid[i], self.bins[i]) for i in (0, 1))
        return rearrange(rows[:, :, None] * self.bins[1] + columns[:, None, :], "b h w -> b (h w)")

    @staticmethod
    def _bin_indices(first: Tensor, last: Tensor, count: int, bins: int) -> Tensor:
        centres = (torch.arange(count, device=first.device) + 0.5) / count
        shares = first[:, None] + (last - first)[:, None] * centres
        return (shares * bins).long().clamp(0, bins - 1)
