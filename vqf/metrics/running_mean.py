"""Mean over images, with a bootstrap interval."""

import numpy as np
import torch
from torch import Tensor

CONFIDENCE, RESAMPLES = 0.95, 1000
MAX_DRAWS_AT_ONCE = 2**18  # random indices in memory at once


class RunningMean:
    """Mean over values, summed in float64 on their device."""

    def __init__(self, device: torch.device | str) -> None:
        self.total = torch.zeros((), dtype=accumulation_dtype(device), device=device)
        self.count = torch.zeros((), dtype=accumulation_dtype(device), device=device)
        self.values: list[Tensor] = []

    def update(self, values: Tensor) -> None:
        self.total += values.sum(dtype=self.total.dtype)
        self.count += values.numel()
        self.values.append(values.detach())

    def compute(self) -> float:
        """Return the mean, or nan without values."""
        return float(self.total / self.count)

    def interval(self) -> tuple[float, float]:
        return bootstrap_interval(torch.cat(self.values).double().cpu().numpy()) if self.count else (np.nan, np.nan)


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values (n,)."""
    random = np.random.default_rng(0)
    rows = min(-(-MAX_DRAWS_AT_ONCE // len(values)), RESAMPLES)
    draws = (random.integers(len(values), size=(rows, len(values))) for _ in range(0, RESAMPLES, rows))
    means = np.concatenate([values[indices].mean(1) for indices in draws])[:RESAMPLES]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def accumulation_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on MPS."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def to_unit_range(images: Tensor) -> Tensor:
    """Scale images from [-1, 1] to [0, 1] in float64, clamped."""
    return (images.to(accumulation_dtype(images.device)).clamp(-1, 1) + 1) / 2
