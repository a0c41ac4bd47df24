"""The prefixes of a sample: one for a full image, or one for each window.

Without crop boxes, windows get boxes of the size of the training crops (`crop_extent`), spread from edge to edge.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from vqf.batch import Batch, Size
from vqf.models.conditioning import ConditionerStack
from vqf.protocols import WindowPrefix
from vqf.tokens.prefix import Prefix


def full_prefixes(
    conditioner: ConditionerStack, batch: Batch, grid: Size, crop_extent: Sequence[float] | None
) -> tuple[Prefix, Prefix | None]:
    """The prefix of a batch of conditions, and the null prefix."""
    batch = replace(batch, crop_boxes=_window_conditions(batch, (0, 0), grid, grid, crop_extent).crop_boxes)
    return conditioner(batch), conditioner.null_prefix(batch)


def window_prefixes(
    conditioner: ConditionerStack, batch: Batch, grid: Size, trained_grid: Size, crop_extent: Sequence[float] | None
) -> tuple[WindowPrefix, WindowPrefix | None]:
    """`full_prefixes` as functions of a window of the grid."""

    def prefix(start: Size, size: Size) -> Prefix:
        return conditioner(_window_conditions(batch, start, size, grid, crop_extent))

    def null_prefix(start: Size, size: Size) -> Prefix:
        null = conditioner.null_prefix(_window_conditions(batch, start, size, grid, crop_extent))
        assert null is not None, "one window has a null prefix, so all have"
        return null

    first_window = (min(trained_grid[0], grid[0]), min(trained_grid[1], grid[1]))
    droppable = conditioner.null_prefix(_window_conditions(batch, (0, 0), first_window, grid, crop_extent)) is not None
    return prefix, null_prefix if droppable else None


def _window_conditions(batch: Batch, start: Size, size: Size, grid: Size, crop_extent: Sequence[float] | None) -> Batch:
    window = batch.window(start, size, grid)
    if batch.crop_boxes is not None or crop_extent is None or window.crop_boxes is None:
        return window
    extent = torch.tensor(crop_extent, device=window.crop_boxes.device).clamp(max=1)
    # From 0 at the upper or left edge of the grid to 1 at the other edge.
    progress = [start[i] / (grid[i] - size[i]) if grid[i] > size[i] else 0.5 for i in (0, 1)]
    corner = torch.tensor(progress, device=extent.device) * (1 - extent)
    return replace(window, crop_boxes=torch.cat([corner, corner + extent]).expand(len(batch), 4))
