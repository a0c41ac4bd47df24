"""Pixel losses."""

import torch.nn.functional as F
from torch import Tensor, nn

from vqf.options.ranges import NonNegativeFloat
from vqf.registry import register


@register("loss", "l1")
class L1(nn.Module):
    """Mean absolute error, as in the code of VQGAN.

    Args:
        weight: Factor in the total loss.
    """

    def __init__(self, *, weight: NonNegativeFloat = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        return F.l1_loss(reconstructions, images)


@register("loss", "l2")
class L2(nn.Module):
    """Mean squared error, as in VQ-VAE and in the text of the VQGAN paper.

    Args:
        weight: Factor in the total loss.
    """

    def __init__(self, *, weight: NonNegativeFloat = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        return F.mse_loss(reconstructions, images)
