"""What a feature network sees in a set of pictures."""

import torch
from torch import Tensor

from vqf.errors import UserError
from vqf.protocols import FeatureNetwork, FeatureSet

KEPT = 50_000  # features of a set that are kept one by one


class Collector:
    """Gathers what a network sees in pictures that come batch by batch.

    Mean and covariance are summed in float64 where the network is; features go to the CPU.

    Args:
        network: Looks at the pictures.
        count: How many there will be. Of more than `keep`, so many are kept one by one, spread evenly.
        keep: See `count`.
    """

    def __init__(self, network: FeatureNetwork, count: int | None = None, keep: int = KEPT) -> None:
        self.network, self.seen = network, 0
        self.every = 1.0 if count is None else max(count / keep, 1.0)
        self.sum: Tensor | float = 0.0
        self.products: Tensor | float = 0.0
        self.features: list[Tensor] = []
        self.logits: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        """Look at images (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: If they have no colours.
        """
        if images.shape[1] != 3:
            raise UserError(f"metrics on features look at pictures with 3 channels, not {images.shape[1]}")
        features, logits = self.network(images)
        exact = features.cpu().double() if features.device.type == "mps" else features.double()
        self.sum, self.products = self.sum + exact.sum(0), self.products + exact.T @ exact
        numbers = torch.arange(self.seen, self.seen + len(images))
        kept = torch.floor((numbers + 1) / self.every) > torch.floor(numbers / self.every)
        self.features.append(features.float().cpu()[kept])
        if logits is not None:
            self.logits.append(logits.float().cpu()[kept])
        self.seen += len(images)

    def result(self) -> FeatureSet:
        """Return what was seen.

        Raises:
            UserError: If it was fewer than two pictures.
        """
        if self.seen < 2:
            raise UserError(f"a set of {self.seen} pictures has no covariance; compare at least two")
        assert isinstance(self.sum, Tensor) and isinstance(self.products, Tensor)
        mean = self.sum / self.seen
        covariance = (self.products - self.seen * torch.outer(mean, mean)) / (self.seen - 1)
        logits = torch.cat(self.logits) if self.logits else None
        return FeatureSet(self.seen, mean.cpu(), covariance.cpu(), torch.cat(self.features), logits)


def set_of(features: Tensor, logits: Tensor | None = None) -> FeatureSet:
    """Return the set whose pictures have these features (n, D)."""
    exact = features.double()
    return FeatureSet(len(features), exact.mean(0), torch.cov(exact.T), features, logits)
