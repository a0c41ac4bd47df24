"""Losses for class maps, reconstructed as logits."""

import torch.nn.functional as F
from torch import Tensor, nn

from vqf.options.ranges import NonNegativeFloat
from vqf.registry import register


@register("loss", "bce")
class BCE(nn.Module):
    """Binary cross-entropy of every class at every pixel, from logits, as VQGAN trains segmentation maps.

    `BCELossWithQuant` of taming-transformers. Maps are one-hot.

    Args:
        weight: Factor in the total loss.
    """

    expects_logits = True

    def __init__(self, *, weight: NonNegativeFloat = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Compare logits with maps in [0, 1], both (B, C, H, W)."""
        return F.binary_cross_entropy_with_logits(reconstructions, images)
