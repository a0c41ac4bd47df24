"""Features of a set of images, and their moments."""

import torch
from torch import Tensor

from vqf.errors import UserError
from vqf.protocols import FeatureNetwork, FeatureSet

MAX_KEPT_FEATURES = 50_000  # individual features kept per set; mean and covariance use all


class FeatureAccumulator:
    """Accumulates features of images, and their moments in float64.

    Args:
        count: Number of images to come; above `max_kept`, features are subsampled evenly.
    """

    def __init__(self, network: FeatureNetwork, count: int | None = None, max_kept: int = MAX_KEPT_FEATURES) -> None:
        self.network, self.count = network, 0
        self.stride = 1.0 if count is None else max(count / max_kept, 1.0)
        self.sum: Tensor | float = 0.0
        self.products: Tensor | float = 0.0
        self.features: list[Tensor] = []
        self.logits: list[Tensor] = []

    def update(self, images: Tensor) -> None:
        """Add images (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: If they are not RGB.
        """
        if images.shape[1] != 3:
            raise UserError(f"feature metrics need images with 3 channels, not {images.shape[1]}")
        features, logits = self.network(images)
        exact = features.cpu().double() if features.device.type == "mps" else features.double()
        self.sum, self.products = self.sum + exact.sum(0), self.products + exact.T @ exact
        positions = torch.arange(self.count, self.count + len(images))
        kept = torch.floor((positions + 1) / self.stride) > torch.floor(positions / self.stride)
        self.features.append(features.float().cpu()[kept])
        if logits is not None:
            self.logits.append(logits.float().cpu()[kept])
        self.count += len(images)

    def compute(self) -> FeatureSet:
        """Return mean, covariance and features.

        Raises:
            UserError: If there are fewer than two images.
        """
        if self.count < 2:
            raise UserError(f"a set of {self.count} images has no covariance; use at least two")
        assert isinstance(self.sum, Tensor) and isinstance(self.products, Tensor)
        mean = self.sum / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        logits = torch.cat(self.logits) if self.logits else None
        return FeatureSet(self.count, mean.cpu(), covariance.cpu(), torch.cat(self.features), logits)


def feature_set(features: Tensor, logits: Tensor | None = None) -> FeatureSet:
    """Build a FeatureSet from features (n, D) and logits (n, C)."""
    exact = features.double()
    return FeatureSet(len(features), exact.mean(0), torch.cov(exact.T), features, logits)
