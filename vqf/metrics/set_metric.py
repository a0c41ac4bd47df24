"""What all metrics that compare sets of pictures by their features have in common."""

from collections.abc import Mapping

import torch

from vqf.networks.feature_extractors import INCEPTION, embedding
from vqf.networks.feature_set import Collector
from vqf.protocols import Comparison, FeatureSet, Reconstruction


class SetComparison:
    """Compares generated pictures with real ones; as a metric of a tokenizer, reconstructions with their originals."""

    prefix = ""
    higher_is_better: Mapping[str, bool] = {}

    def __init__(self, device: torch.device | str, network: str, weights: str | None, sha256: str | None) -> None:
        self.network = embedding(network, weights, sha256, torch.device(device))
        self.digest = self.network.digest
        senses = type(self).higher_is_better.items()  # of the networks that are usual
        self.higher_is_better = {key.replace("lite2", self.network.name): sense for key, sense in senses}
        self.real, self.generated = Collector(self.network), Collector(self.network)

    def update(self, batch: Reconstruction) -> None:
        """Look at a batch."""
        self.real.add(batch.images)
        self.generated.add(batch.reconstructions)

    def compute(self) -> dict[str, float]:
        """Compare the reconstructions with the originals."""
        values = self.compare(self.real.result(), self.generated.result()).values
        return {f"{self.prefix}{key}": value for key, value in values.items()}

    def compare(self, real: FeatureSet, generated: FeatureSet) -> Comparison:
        """Compare two sets."""
        raise NotImplementedError

    def named(self, inception: str, other: str) -> str:
        """Return the name of a number: only those of the Inception network have the names of papers."""
        return inception if self.network.name == INCEPTION else f"{other}_{self.network.name}"
