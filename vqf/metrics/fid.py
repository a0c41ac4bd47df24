"""The Frechet distance between the Gaussians that two sets of features are taken for.

GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (FID), https://arxiv.org/abs/1706.08500
"""

from collections.abc import Mapping

import torch

from vqf.metrics.set_metric import BaseSetMetric
from vqf.networks.feature_extractors import INCEPTION
from vqf.protocols import FeatureSet, SetMetricResult
from vqf.registry import register


class FrechetDistance(BaseSetMetric):
    """d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), by torch-fidelity in float64."""

    reconstruction_prefix = "r"

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult:
        """Return `fid`, or `fd_` and the network's name."""
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

        first, second = ({"mu": each.mean.numpy(), "sigma": each.covariance.numpy()} for each in (generated, real))
        value = fid_statistics_to_metric(first, second, False)[KEY_METRIC_FID]
        return SetMetricResult({self.metric_name("fid", "fd"): value})


@register("metric", "fid")
class FID(FrechetDistance):
    """Frechet Inception distance; `rfid` where the images are reconstructions.

    Args:
        weights: A file of the Inception weights as torch-fidelity ports them; None: torch's hub.
        sha256: What the file must have, where it is not the published one.
    """

    higher_is_better: Mapping[str, bool] = {"rfid": False}

    def __init__(self, device: torch.device | str, *, weights: str | None = None, sha256: str | None = None) -> None:
        super().__init__(device, INCEPTION, weights, sha256)


@register("metric", "fd")
class FD(FrechetDistance):
    """The same distance on features of another network, called `fd_` and its name: never comparable with FID.

    Args:
        network: "lite2", which needs no download, or any classifier of timm.
        weights: A file of its weights; None: timm's hub.
    """

    higher_is_better: Mapping[str, bool] = {"rfd_lite2": False}

    def __init__(self, device: torch.device | str, *, network: str = "lite2", weights: str | None = None) -> None:
        super().__init__(device, network, weights, None)
