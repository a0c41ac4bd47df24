"""What each kind of component promises. A plugin inherits nothing: it only has to fit.

Shapes, everywhere in vqf:

* images are float tensors (B, 3, H, W) in [-1, 1];
* latents are (B, D, h, w), with h = H / stride and w = W / stride;
* indices are int64 (B, h, w), or (B, h, w, K) for K codebooks, in [0, vocab_size);
* tokens are int64 (B, N), the indices row by row;
* a prefix is int64 (B, M), the tokens of a condition, in a vocabulary of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

Size = tuple[int, int]
GridPosition = tuple[
    float, float
]  # row and column in the grid of an image's codes; the centre of a code is a whole number


@dataclass
class Sample:
    """One image of a data source."""

    image: Tensor  # (3, H, W) float in [-1, 1]
    label: int | None = None
    mask: Tensor | None = None  # (1, H, W) float in [0, 1]: how much of a pixel is drawn, where a source knows
    condition: Tensor | None = None  # (C, H, W) float in [-1, 1]: a map of the same place, where a source has one
    crop_box: Tensor | None = None  # (4,) top, left, bottom, right of what is shown, as shares of the whole image


@dataclass
class Batch:
    """Samples side by side. A stage or conditioner reads the fields it needs."""

    images: Tensor | None = None  # (B, 3, H, W)
    labels: Tensor | None = None  # (B,) int64
    masks: Tensor | None = None  # (B, 1, H, W)
    tokens: Tensor | None = None  # (B, N), where stage 2 trains on cached tokens
    conditions: Tensor | None = None  # (B, C, H, W)
    crop_boxes: Tensor | None = None  # (B, 4)
    # (B, h, w), or (B, p, q, h, w) for windows, what a conditioner has prepared, by its name
    condition_indices: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def collate(cls, samples: Sequence[Sample]) -> "Batch":
        """Stack samples; a field that the first of them lacks is left out."""
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
        """One of the fields that are there: for its length and its device."""
        return next(each for each in (*self._fields().values(), *self.condition_indices.values()))

    def to(self, device: torch.device | str) -> "Batch":
        """Move every field to a device."""
        return self.map(lambda value: value.to(device, non_blocking=True))

    def chunk(self, chunks: int) -> list["Batch"]:
        """Cut the batch into equal micro-batches."""
        size = -(-len(self) // chunks)
        return [self.slice(first, first + size) for first in range(0, len(self), size)]

    def slice(self, start: int, stop: int) -> "Batch":
        """Return the samples from `start` to `stop` - 1."""
        return self.map(lambda value: value[start:stop])

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with every field changed."""
        changed = {name: fn(value) for name, value in self._fields().items()}
        indices = {name: fn(value) for name, value in self.condition_indices.items()}
        return replace(self, **changed, condition_indices=indices)

    def window(self, start: Size, size: Size, grid: Size) -> "Batch":
        """Return what one window of a larger grid is told: its part of every map and of the place.

        Args:
            start: Row and column of the window's first code.
            size: Its height and width in codes.
            grid: Height and width of the whole in codes. Prepared codes may be a coarser grid of the same place: those
                of images that were shifted are where the window is, others where they are nearest to it.
        """
        crop_boxes = _window_crop_boxes(self.crop_boxes_or_full(), start, size, grid)
        indices = {name: _crop_indices(value, start, size, grid) for name, value in self.condition_indices.items()}
        kept = replace(self, images=None, conditions=None, masks=None, tokens=None)
        return replace(kept, crop_boxes=crop_boxes, condition_indices=indices)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that is there by its name."""
        indices = {f"condition_indices.{name}": value for name, value in self.condition_indices.items()}
        return {**self._fields(), **indices}

    def crop_boxes_or_full(self) -> Tensor:
        """Return the places (B, 4); where none are given an image is the whole."""
        if self.crop_boxes is not None:
            return self.crop_boxes
        corner = torch.zeros(len(self), 2, device=self.any_field.device)
        return torch.cat([corner, corner + 1], dim=1)

    def _fields(self) -> dict[str, Tensor]:
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "condition_indices"}
        return {key: value for key, value in values.items() if value is not None}


def pair(size: int | Sequence[int]) -> Size:
    """Read an image size given as one number or as height and width.

    Raises:
        ValueError: If it is neither.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"{list(sides)} is not a height and a width")
    return int(sides[0]), int(sides[1])


def _window_crop_boxes(places: Tensor, start: Size, size: Size, grid: Size) -> Tensor:
    """Return the places (B, 4) of a window of images at `crop_boxes` (B, 4)."""
    corner, extent = places[:, :2], places[:, 2:] - places[:, :2]
    # Number by number: a tensor of them would be a copy to the device, for every window.
    ends = [(start[i] + more * size[i]) / grid[i] for more in (0, 1) for i in (0, 1)]
    return torch.stack([corner[:, n % 2] + extent[:, n % 2] * end for n, end in enumerate(ends)], dim=1)


def _crop_indices(codes: Tensor, start: Size, size: Size, grid: Size) -> Tensor:
    """Return the part (B, h, w) of a map's codes (B, H, W) or (B, p, q, H, W) that a window covers."""
    if codes.ndim == 5:
        steps = codes.shape[1:3]
        (top, left), (height, width) = ((each[0] // steps[0], each[1] // steps[1]) for each in (start, size))
        return codes[:, start[0] % steps[0], start[1] % steps[1], top : top + height, left : left + width]
    sides = codes.shape[1:]
    # Rounded up: where codes are coarser, the last of them may be missing, since they cover whole cells only.
    height, width = (-(-size[i] * sides[i] // grid[i]) for i in (0, 1))
    nearest = [(2 * start[i] * sides[i] + grid[i]) // (2 * grid[i]) for i in (0, 1)]
    top, left = min(nearest[0], sides[0] - height), min(nearest[1], sides[1] - width)
    return codes[:, top : top + height, left : left + width]


def _stack_optional(values: Sequence[Tensor | None]) -> Tensor | None:
    if values[0] is None:
        return None
    assert all(value is not None for value in values), "every sample of a split has the same fields"
    return torch.stack(values)  # type: ignore[arg-type]
