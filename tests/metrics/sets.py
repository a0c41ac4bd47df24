"""Sets of features for tests, and a linear stand-in for a feature network."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from vqf.networks.feature_set import feature_set
from vqf.protocols import FeatureSet


class Linear:
    """Features are weighted sums of pixels, so that tests can compute them."""

    name, digest = "linear", "linear-1"

    def __init__(self) -> None:
        self.asked = 0
        self.weights = torch.randn(3 * 16 * 16, 6, generator=torch.Generator().manual_seed(3)) / 28

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.asked += len(images)
        features = torch.nn.functional.interpolate(images, size=(16, 16)).flatten(1) @ self.weights
        return features, features * 3


def gaussians(count: int, shift: float = 0.0, seed: int = 0, width: int = 8) -> FeatureSet:
    """Features are correlated Gaussians around `shift`; a larger shift gives more confident logits."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / 3
    features = torch.randn(count, width, generator=random) @ mix + shift
    return feature_set(features, (2 + shift) * torch.randn(count, 5, generator=random))


def frechet(first: FeatureSet, second: FeatureSet) -> float:
    """The Frechet distance by its formula, with scipy's matrix square root, in float64."""
    x, y = (each.features.double().numpy() for each in (first, second))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> Linear:
    """Replace the network of every feature metric."""
    from vqf.metrics import set_metric

    network = Linear()
    monkeypatch.setattr(set_metric, "feature_network", lambda *_: network)
    return network
