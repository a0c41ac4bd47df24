"""Losses for maps of classes, whose reconstructions are logits: one channel for every class."""

import torch.nn.functional as F
from torch import Tensor, nn

from vqf.registry import register


@register("loss", "bce")
class BCE(nn.Module):
    """Binary cross-entropy of every class at every pixel, from logits: what VQGAN trains its segmentations with.

    `BCELossWithQuant` of taming-transformers. Maps are 1 in the channel of a pixel's class and 0 elsewhere.
    """

    expects_logits = True

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Compare logits (B, C, H, W) with maps (B, C, H, W) in [0, 1] -> (), the mean."""
        return F.binary_cross_entropy_with_logits(reconstructions, images)
