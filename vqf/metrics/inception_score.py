"""Inception Score.

Improved Techniques for Training GANs (IS), https://arxiv.org/abs/1606.03498
"""

from collections.abc import Mapping
from typing import Any

import torch

from vqf.errors import UserError
from vqf.metrics.set_metric import BaseSetMetric
from vqf.options.ranges import PositiveInt
from vqf.protocols import FeatureSet, SetMetricResult
from vqf.registry import register

TORCH_FIDELITY_SEED = 2020  # its default, which decides the splits


@register("metric", "is")
class InceptionScore(BaseSetMetric):
    """Inception Score, by torch-fidelity; logged as `score_<network>` for other networks.

    exp(mean KL(p(class | image) || p(class))) of the generated images.

    Args:
        splits: The score is the mean over this many disjoint subsets of the images.
    """

    higher_is_better: Mapping[str, bool] = {"is": True, "score_lite2": True}

    def __init__(self, device: torch.device | str, *, splits: PositiveInt = 10, **options: Any) -> None:
        super().__init__(device, **options)
        self.splits = splits

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult:
        """Compute `is`.

        Raises:
            UserError: If there are no class logits, or fewer images than splits.
        """
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

        if generated.logits is None:
            raise UserError(f"metric 'is' needs a classifier; {self.network.name} has no class logits")
        if len(generated.logits) < self.splits:
            raise UserError(f"metric 'is': {len(generated.logits)} images are fewer than splits={self.splits}")
        scores = isc_features_to_metric(generated.logits, self.splits, True, TORCH_FIDELITY_SEED)
        return SetMetricResult({self.metric_name("is", "score"): scores[KEY_METRIC_ISC_MEAN]})
