"""A mean that does not depend on how the pictures were cut into batches."""

import torch
from torch import Tensor


class Mean:
    """The mean over everything added, summed in float64 where the values are: reading a number would wait for them."""

    def __init__(self, device: torch.device | str) -> None:
        self.total = torch.zeros((), dtype=precise(device), device=device)
        self.count = torch.zeros((), dtype=precise(device), device=device)

    def add(self, values: Tensor) -> None:
        """Add values (B,)."""
        self.total += values.sum(dtype=self.total.dtype)
        self.count += values.numel()

    def value(self) -> float:
        """Return the mean; nan before the first value."""
        return float(self.total / self.count)


def precise(device: torch.device | str) -> torch.dtype:
    """Return float64, or float32 on the one kind of device that has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def unit_range(images: Tensor) -> Tensor:
    """Bring images from [-1, 1] to [0, 1] in float64; what lies outside is clamped, nothing is rounded to 8 bits."""
    return (images.to(precise(images.device)).clamp(-1, 1) + 1) / 2
