"""Squared maximum mean discrepancy between two sets of features.

Demystifying MMD GANs (KID), https://arxiv.org/abs/1801.01401
"""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Interval

from vqf.metrics.set_metric import BaseSetMetric
from vqf.protocols import FeatureSet, SetMetricResult
from vqf.registry import register

TORCH_FIDELITY_SEED = 2020  # its default, which decides the subsets


@register("metric", "kid")
class KID(BaseSetMetric):
    """Kernel Inception distance; logged as `kd_<network>` for other networks.

    The unbiased mean over random subsets, in float64. The interval covers 95 % of them.

    Args:
        subsets: Number of random subsets.
        subset_size: Images per subset, lowered to half of the smaller set if that is less.
    """

    higher_is_better: Mapping[str, bool] = {"kid": False, "kd_lite2": False}

    def __init__(
        self,
        device: torch.device | str,
        *,
        subsets: Annotated[int, Interval(ge=1, le=10_000)] = 100,
        subset_size: Annotated[int, Ge(2)] = 1000,
        **options: Any,
    ) -> None:
        super().__init__(device, **options)
        self.subsets, self.subset_size = subsets, subset_size

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult:
        from torch_fidelity.metric_kid import kernel_mmd

        first, second = (side.features.double().numpy() for side in (generated, real))
        size = max(min(self.subset_size, len(first) // 2, len(second) // 2), 2)
        random, estimates = np.random.RandomState(TORCH_FIDELITY_SEED), []
        for _ in range(self.subsets):
            subset = [rows[random.choice(len(rows), size, replace=False)] for rows in (first, second)]
            estimates.append(kernel_mmd(*subset, kid_kernel="poly"))
        low, high = np.quantile(estimates, [0.025, 0.975])
        name = self.metric_name("kid", "kd")
        return SetMetricResult(
            {name: float(np.mean(estimates))}, {name: (float(low), float(high))}, {"subset_size": size}
        )
