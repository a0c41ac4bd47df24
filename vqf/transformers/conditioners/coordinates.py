"""Conditioning on the coordinates of an image crop.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841; `CoordStage` of its code.
"""

from typing import Annotated

import torch
from annotated_types import Interval
from einops import rearrange
from torch import Tensor, nn

from vqf.batch import Batch
from vqf.registry import register
from vqf.tokens.layout import TokenLayout
from vqf.transformers.conditioners.spatial import _cell_centers, image_grid

Bins = Annotated[int, Interval(ge=1, le=4096)]


@register("conditioner", "coordinates")
class CoordinatesConditioner(nn.Module):
    """The position of every token in the full image, so that the prior knows where a crop or window is.

    Unlike in `CoordStage`, bins are fractions of height and width.

    Args:
        rows: Bins of the height of the full image; 1 hides the row.
        columns: Bins of its width.
    """

    batch_field = "crop_boxes"

    def __init__(self, layout: TokenLayout, *, rows: Bins = 32, columns: Bins = 32) -> None:
        super().__init__()
        self.grid, self.bins = image_grid(layout, "coordinates"), (rows, columns)
        self.positions = _cell_centers(self.grid, 1, 1)
        self.length, self.vocab_size = len(self.positions), rows * columns

    def forward(self, batch: Batch) -> Tensor:
        """Prefix (B, h * w): row bin * `columns` + column bin of every token."""
        boxes = batch.crop_boxes_or_full().to(torch.float32)
        rows, columns = (self._bin_indices(boxes[:, i], boxes[:, i + 2], self.grid[i], self.bins[i]) for i in (0, 1))
        return rearrange(rows[:, :, None] * self.bins[1] + columns[:, None, :], "b h w -> b (h w)")

    @staticmethod
    def _bin_indices(first: Tensor, last: Tensor, count: int, bins: int) -> Tensor:
        centers = (torch.arange(count, device=first.device) + 0.5) / count
        fractions = first[:, None] + (last - first)[:, None] * centers
        return (fractions * bins).long().clamp(0, bins - 1)
