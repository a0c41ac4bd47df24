"""Perceptual distances of reconstructions: the losses of the same names, as metrics.

The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (LPIPS), https://arxiv.org/abs/1801.03924
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vqf.features import Lite, PerceptualDistance, lite, lpips_heads, vgg16
from vqf.metrics.mean import Mean
from vqf.protocols import Reconstruction
from vqf.registry import register


@register("metric", "features")
class Perceptual:
    """Perceptual distance (EfficientNet-Lite, LPIPS form, uncalibrated): not comparable with published LPIPS."""

    def __init__(
        self, device: torch.device | str, *, network: Lite = "lite0", taps: Sequence[int] = (0, 1, 2, 3, 5)
    ) -> None:
        self.distance = PerceptualDistance(lite(network, taps)).to(device)
        self.mean = Mean(device)

    def update(self, batch: Reconstruction) -> None:
        """Look at a batch."""
        self.mean.add(_compare(self.distance, batch))

    def compute(self) -> dict[str, float]:
        """Return `perceptual`."""
        return {"perceptual": self.mean.value()}


@register("metric", "lpips")
class LPIPS:
    """LPIPS v0.1 on VGG16, as papers report it. `weights` is a file of torchvision's VGG16; None: torch's hub."""

    def __init__(self, device: torch.device | str, *, weights: str | None = None) -> None:
        self.distance = PerceptualDistance(vgg16(weights), lpips_heads()).to(device)
        self.mean = Mean(device)

    def update(self, batch: Reconstruction) -> None:
        """Look at a batch."""
        self.mean.add(_compare(self.distance, batch))

    def compute(self) -> dict[str, float]:
        """Return `lpips`."""
        return {"lpips": self.mean.value()}


@torch.no_grad()
def _compare(distance: PerceptualDistance, batch: Reconstruction) -> Tensor:
    return distance(batch.reconstructions.clamp(-1, 1), batch.images.clamp(-1, 1))
