"""Distances between pixels, means over all of them."""

import torch.nn.functional as F
from torch import Tensor, nn

from vqf.registry import register


@register("loss", "l1")
class L1(nn.Module):
    """Mean absolute error: what the code of VQGAN uses."""

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Compare (B, 3, H, W) with (B, 3, H, W)."""
        return F.l1_loss(reconstructions, images)


@register("loss", "l2")
class L2(nn.Module):
    """Mean squared error: what the VQ-VAE and the text of the VQGAN paper use."""

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Compare (B, 3, H, W) with (B, 3, H, W)."""
        return F.mse_loss(reconstructions, images)
