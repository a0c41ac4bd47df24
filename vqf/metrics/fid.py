"""Frechet distance between two sets of features.

GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (FID), https://arxiv.org/abs/1706.08500
"""

from collections.abc import Mapping

import torch

from vqf.metrics.set_metric import BaseSetMetric
from vqf.protocols import FeatureSet, SetMetricResult
from vqf.registry import register


class FrechetDistance(BaseSetMetric):
    """d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), by torch-fidelity in float64."""

    reconstruction_prefix = "r"

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult:
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

        first, second = ({"mu": side.mean.numpy(), "sigma": side.covariance.numpy()} for side in (generated, real))
        value = fid_statistics_to_metric(first, second, False)[KEY_METRIC_FID]
        return SetMetricResult({self.metric_name("fid", "fd"): value})


@register("metric", "fid")
class FID(FrechetDistance):
    """Frechet Inception distance; `rfid` for reconstructions.

    Args:
        weights: File of the Inception weights in torch-fidelity's port; null takes them from torch's hub.
        sha256: Expected sha256 of that file if it is not the published one.
    """

    higher_is_better: Mapping[str, bool] = {"rfid": False}

    def __init__(self, device: torch.device | str, *, weights: str | None = None, sha256: str | None = None) -> None:
        super().__init__(device, weights=weights, sha256=sha256)


@register("metric", "fd")
class FD(FrechetDistance):
    """Frechet distance on features of another network, logged as `fd_<network>`; not comparable with FID.

    Args:
        network: "lite2" (no download) or the name of any classifier of timm.
        weights: File of the weights of timm's classifier; null takes them from timm's hub.
    """

    higher_is_better: Mapping[str, bool] = {"rfd_lite2": False}

    def __init__(self, device: torch.device | str, *, network: str = "lite2", weights: str | None = None) -> None:
        super().__init__(device, network=network, weights=weights)
