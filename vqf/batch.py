"""Images of a data source (`Sample`), stacked (`Batch`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

Size = tuple[int, int]
# Row and column in the grid of an image's indices. Cell centers are whole numbers, a coarser condition's lie between.
GridPosition = tuple[float, float]


@dataclass
class Sample:
    """One image of a data source."""

    image: Tensor  # (3, H, W) float in [-1, 1]
    label: int | None = None
    mask: Tensor | None = None  # (1, H, W) float in [0, 1]: coverage of each pixel, for metrics; 0 is background
    condition: Tensor | None = None  # (C, H, W) float in [-1, 1]: a condition map, aligned with the image
    crop_box: Tensor | None = None  # (4,) top, left, bottom, right as fractions of the full image


@dataclass
class Batch:
    """Stacked samples."""

    images: Tensor | None = None  # (B, 3, H, W)
    labels: Tensor | None = None  # (B,) int64
    masks: Tensor | None = None  # (B, 1, H, W)
    tokens: Tensor | None = None  # (B, N) int64, where stage 2 trains on cached tokens
    conditions: Tensor | None = None  # (B, C, H, W)
    crop_boxes: Tensor | None = None  # (B, 4)
    # By name of the conditioner that prepared them: (B, h, w), or (B, p, q, h, w) with shifts (`prepare_shifted`)
    condition_indices: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def collate(cls, samples: Sequence[Sample]) -> "Batch":
        labels = [sample.label for sample in samples]
        return cls(
            images=torch.stack([sample.image for sample in samples]),
            labels=None if labels[0] is None else torch.tensor(labels),
            masks=_stack_optional([sample.mask for sample in samples]),
            conditions=_stack_optional([sample.condition for sample in samples]),
            crop_boxes=_stack_optional([sample.crop_box for sample in samples]),
        )

    def __len__(self) -> int:
        return len(self.any_field)

    @property
    def any_field(self) -> Tensor:
        return next(iter(self.tensors().values()))

    def to(self, device: torch.device | str) -> "Batch":
        return self.map(lambda value: value.to(device, non_blocking=True))

    def chunk(self, chunks: int) -> list["Batch"]:
        size = -(-len(self) // chunks)
        return [self.slice(first, first + size) for first in range(0, len(self), size)]

    def slice(self, start: int, stop: int) -> "Batch":
        return self.map(lambda value: value[start:stop])

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        mapped = {name: fn(value) for name, value in self._fields().items()}
        indices = {name: fn(value) for name, value in self.condition_indices.items()}
        return replace(self, **mapped, condition_indices=indices)

    def window(self, start: Size, size: Size, grid: Size) -> "Batch":
        """Crop the conditions to one window of a larger grid, and add its crop boxes.

        Positions and sizes are (rows, columns) of cells. With shifts, (B, p, q, h, w), the crop of condition indices is
        exact; without, it starts at the nearest cell.
        """
        crop_boxes = _window_crop_boxes(self.crop_boxes_or_full(), start, size, grid)
        indices = {name: _crop_indices(value, start, size, grid) for name, value in self.condition_indices.items()}
        without_images = replace(self, images=None, conditions=None, masks=None, tokens=None)
        return replace(without_images, crop_boxes=crop_boxes, condition_indices=indices)

    def tensors(self) -> dict[str, Tensor]:
        """A conditioner's are `condition_indices.NAME`."""
        indices = {f"condition_indices.{name}": value for name, value in self.condition_indices.items()}
        return {**self._fields(), **indices}

    def crop_boxes_or_full(self) -> Tensor:
        """By default of the full image, (B, 4)."""
        if self.crop_boxes is not None:
            return self.crop_boxes
        corner = torch.zeros(len(self), 2, device=self.any_field.device)
        return torch.cat([corner, corner + 1], dim=1)

    def _fields(self) -> dict[str, Tensor]:
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "condition_indices"}
        return {key: value for key, value in values.items() if value is not None}


def pair(size: int | Sequence[int]) -> Size:
    """Read an image size: one number, or height and width.

    Raises:
        ValueError: If it is neither.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"{list(sides)} is not a height and a width")
    return int(sides[0]), int(sides[1])


def _window_crop_boxes(crop_boxes: Tensor, start: Size, size: Size, grid: Size) -> Tensor:
    corner, extent = crop_boxes[:, :2], crop_boxes[:, 2:] - crop_boxes[:, :2]
    # Python floats: a tensor of them would be one copy to the device a window.
    top_left = [start[i] / grid[i] for i in (0, 1)]
    bottom_right = [(start[i] + size[i]) / grid[i] for i in (0, 1)]
    edges = enumerate([*top_left, *bottom_right])
    return torch.stack([corner[:, n % 2] + extent[:, n % 2] * edge for n, edge in edges], dim=1)


def _crop_indices(indices: Tensor, start: Size, size: Size, grid: Size) -> Tensor:
    """Indices (B, H, W) or (B, p, q, H, W) to (B, h, w)."""
    if indices.ndim == 5:
        p, q = indices.shape[1:3]
        (top, left), (height, width) = ((each[0] // p, each[1] // q) for each in (start, size))
        return indices[:, start[0] % p, start[1] % q, top : top + height, left : left + width]
    sides = indices.shape[1:]
    # Rounded up: a coarser condition has indices of complete cells only, and so may lack the last one.
    height, width = (-(-size[i] * sides[i] // grid[i]) for i in (0, 1))
    nearest = [(2 * start[i] * sides[i] + grid[i]) // (2 * grid[i]) for i in (0, 1)]
    top, left = min(nearest[0], sides[0] - height), min(nearest[1], sides[1] - width)
    return indices[:, top : top + height, left : left + width]


def _stack_optional(values: Sequence[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    assert len(present) in (0, len(values)), "every sample of a split has the same fields"
    return torch.stack(present) if present else None
