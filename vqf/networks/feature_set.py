"""What a feature network sees in a set of images."""

import torch
from torch import Tensor

from vqf.errors import UserError
from vqf.protocols import FeatureNetwork, FeatureSet

MAX_KEPT_FEATURES = 50_000  # features of a set that are kept one by one


class FeatureAccumulator:
    """Gathers what a network sees in images that come batch by batch.

    Mean and covariance are summed in float64 where the network is; features go to the CPU.

    Args:
        network: Looks at the images.
        count: How many there will be. Of more than `max_kept`, so many are kept one by one, spread evenly.
        max_kept: See `count`.
    """

    def __init__(self, network: FeatureNetwork, count: int | None = None, max_kept: int = MAX_KEPT_FEATURES) -> None:
        self.network, self.count = network, 0
        self.stride = 1.0 if count is None else max(count / max_kept, 1.0)
        self.sum: Tensor | float = 0.0
        self.products: Tensor | float = 0.0
        self.features: list[Tensor] = []
        self.logits: list[Tensor] = []

    def update(self, images: Tensor) -> None:
        """Look at images (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: If they have no colours.
        """
        if images.shape[1] != 3:
            raise UserError(f"metrics on features look at images with 3 channels, not {images.shape[1]}")
        features, logits = self.network(images)
        exact = features.cpu().double() if features.device.type == "mps" else features.double()
        self.sum, self.products = self.sum + exact.sum(0), self.products + exact.T @ exact
        numbers = torch.arange(self.count, self.count + len(images))
        kept = torch.floor((numbers + 1) / self.stride) > torch.floor(numbers / self.stride)
        self.features.append(features.float().cpu()[kept])
        if logits is not None:
            self.logits.append(logits.float().cpu()[kept])
        self.count += len(images)

    def compute(self) -> FeatureSet:
        """Return what was seen.

        Raises:
            UserError: If it was fewer than two images.
        """
        if self.count < 2:
            raise UserError(f"a set of {self.count} images has no covariance; compare at least two")
        assert isinstance(self.sum, Tensor) and isinstance(self.products, Tensor)
        mean = self.sum / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        logits = torch.cat(self.logits) if self.logits else None
        return FeatureSet(self.count, mean.cpu(), covariance.cpu(), torch.cat(self.features), logits)


def feature_set(features: Tensor, logits: Tensor | None = None) -> FeatureSet:
    """Return the set whose images have these features (n, D)."""
    exact = features.double()
    return FeatureSet(len(features), exact.mean(0), torch.cov(exact.T), features, logits)
