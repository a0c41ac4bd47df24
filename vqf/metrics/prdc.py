"""Precision, recall, density and coverage.

Improved Precision and Recall Metric for Assessing Generative Models, https://arxiv.org/abs/1904.06991
Reliable Fidelity and Diversity Metrics for Generative Models (density, coverage), https://arxiv.org/abs/2002.09797
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from vqf.errors import UserError
from vqf.metrics.set_metric import BaseSetMetric
from vqf.options.ranges import PositiveInt
from vqf.protocols import FeatureSet, SetMetricResult
from vqf.registry import register

CHUNK_ROWS = 1000  # rows of a distance matrix in memory at once


@register("metric", "prdc")
class PRDC(BaseSetMetric):
    """Precision, recall, density and coverage, in float64; logged as `precision_<network>` for other networks.

    Papers use Inception (ADM) or VGG16.

    Args:
        neighbours: k of the nearest neighbors of precision and recall.
        wider: k of the nearest neighbors of density and coverage.
        images: Maximum number of real images, spread evenly over a larger set; 10,000 in ADM's evaluation.
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
        neighbours: PositiveInt = 3,
        wider: PositiveInt = 5,
        images: Annotated[int, Ge(2)] = 10_000,
        **options: Any,
    ) -> None:
        super().__init__(device, **options)
        self.neighbours, self.wider, self.images = neighbours, wider, images

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult:
        """Compute the four values.

        Raises:
            UserError: If a set has too few images.
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
    """Density and coverage of generated features (n, D) relative to real ones (m, D).

    Each real image has a ball up to its k-th nearest real neighbor. Density is the mean number of balls that contain a
    generated image, divided by k; coverage is the fraction of balls that contain any.
    """
    inside, covered = 0, 0
    for chunk in real.split(CHUNK_ROWS):
        # neighbours + 1: the nearest is the image itself.
        radii = torch.cdist(chunk, real).kthvalue(neighbours + 1, dim=1, keepdim=True).values
        within = torch.cdist(chunk, generated) < radii
        inside, covered = inside + int(within.sum()), covered + int(within.any(1).sum())
    return inside / (neighbours * len(generated)), covered / len(real)
