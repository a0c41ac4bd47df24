"""What all metrics that compare sets of images by their features have in common."""

from collections.abc import Mapping

import torch

from vqf.networks.feature_extractors import INCEPTION, feature_network
from vqf.networks.feature_set import FeatureAccumulator
from vqf.protocols import FeatureSet, Reconstruction, SetMetricResult


class BaseSetMetric:
    """Compares generated images with real ones; as a metric of a tokenizer, reconstructions with their originals."""

    reconstruction_prefix = ""
    higher_is_better: Mapping[str, bool] = {}

    def __init__(self, device: torch.device | str, network: str, weights: str | None, sha256: str | None) -> None:
        self.network = feature_network(network, weights, sha256, torch.device(device))
        self.digest = self.network.digest
        senses = type(self).higher_is_better.items()  # of the networks that are usual
        self.higher_is_better = {key.replace("lite2", self.network.name): sense for key, sense in senses}
        self.real, self.generated = FeatureAccumulator(self.network), FeatureAccumulator(self.network)

    def update(self, batch: Reconstruction) -> None:
        """Look at a batch."""
        self.real.update(batch.images)
        self.generated.update(batch.reconstructions)

    def compute(self) -> dict[str, float]:
        """Compare the reconstructions with the originals."""
        values = self.compare(self.real.compute(), self.generated.compute()).values
        return {f"{self.reconstruction_prefix}{key}": value for key, value in values.items()}

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult:
        """Compare two sets."""
        raise NotImplementedError

    def metric_name(self, inception_name: str, other_name: str) -> str:
        """Return the name of a number: only those of the Inception network have the names of papers."""
        return inception_name if self.network.name == INCEPTION else f"{other_name}_{self.network.name}"
