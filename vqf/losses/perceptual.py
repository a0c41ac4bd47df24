"""Perceptual losses: distances between the features of a frozen network instead of between pixels.

The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (LPIPS), https://arxiv.org/abs/1801.03924
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from vqf.networks.perceptual import (
    EfficientNetLite,
    PerceptualDistance,
    efficientnet_lite,
    lpips_heads,
    unit_normalize,
    unit_normalize_reference,
    vgg16_features,
)
from vqf.registry import register


@register("loss", "features")
class FeatureLoss(nn.Module):
    """The form of LPIPS on EfficientNet-Lite, with unit weights instead of calibrated ones; it needs no download.

    Taps: 0 is the stem, 1 to 7 the stages. What lies after the last tap is not computed, and the last taps see the
    widest surroundings. It is sensitive to fine noise: keep l1 beside it.
    """

    channels = (1, 3)  # one is shown to the network as grey

    def __init__(
        self, *, weight: float = 0.1, network: EfficientNetLite = "lite0", taps: Sequence[int] = (0, 1, 2, 3)
    ) -> None:
        super().__init__()
        self.weight = weight
        self.distance = PerceptualDistance(efficientnet_lite(network, taps))

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Compare (B, 3, H, W) with (B, 3, H, W) -> ()."""
        return self.distance(reconstructions, images).mean()


@register("loss", "lpips")
class LPIPS(nn.Module):
    """LPIPS v0.1 on VGG16, the perceptual loss of VQGAN.

    `weights` is a file of torchvision's VGG16; None takes it from torch's hub. The reference trains with dropout
    0.5 in front of the heads, which makes the loss a noisy unbiased estimate; `dropout` brings that back. It divides
    features by their length plus 1e-10, which has a NaN gradient where all are 0: `epsilon: beside` does so, too, and
    `under` puts the number under the root of the length.
    """

    channels = (1, 3)

    def __init__(
        self,
        *,
        weight: float = 1.0,
        weights: str | None = None,
        dropout: bool = False,
        epsilon: Literal["under", "beside"] = "under",
    ) -> None:
        super().__init__()
        self.weight = weight
        normalise = unit_normalize_reference if epsilon == "beside" else unit_normalize
        self.distance = PerceptualDistance(vgg16_features(weights), lpips_heads(), dropout, normalise)

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Compare (B, 3, H, W) with (B, 3, H, W) -> ()."""
        return self.distance(reconstructions, images).mean()
