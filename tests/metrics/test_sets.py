"""Distances between sets: each against another library's, or its formula written out."""

import numpy as np
import prdc
import pytest
import torch
from torch import Tensor

from tests.metrics.sets import Linear, frechet, gaussians
from tests.support.layouts import raster
from vqf.errors import UserError
from vqf.metrics.prdc import density_coverage
from vqf.networks.feature_set import FeatureAccumulator, feature_set
from vqf.protocols import FeatureSet, Reconstruction, SetMetric
from vqf.registry import build

pytestmark = pytest.mark.usefixtures("linear")


def metric(name: str, **options: object) -> SetMetric:
    built = build("metric", {"name": name, **options}, layout=raster((2, 2), 8), device="cpu")
    assert isinstance(built, SetMetric)
    return built


def compared(name: str, real: FeatureSet, generated: FeatureSet, **options: object) -> dict[str, float]:
    return metric(name, **options).compare(real, generated).values


@pytest.mark.parametrize("count", [5, 300])  # fewer images than features, and more
def test_frechet_distance_equals_scipys(count: int) -> None:
    real, generated = gaussians(300), gaussians(count, shift=0.3, seed=1)
    expected = frechet(real, generated)
    assert compared("fd", real, generated)["fd_linear"] == pytest.approx(expected, rel=1e-6)
    assert compared("fd", generated, real)["fd_linear"] == pytest.approx(expected, rel=1e-6)
    assert compared("fid", real, generated) == compared("fd", real, generated)


def test_frechet_distance_of_known_gaussians() -> None:
    """Of commuting covariances it is |mu - nu|^2 + sum (sqrt a_i - sqrt b_i)^2."""
    a, b, mu = (
        torch.tensor([1.0, 4, 9]).double(),
        torch.tensor([4.0, 4, 1]).double(),
        torch.tensor([1.0, 0, 2]).double(),
    )
    sets = [FeatureSet(10, mean, torch.diag(each), torch.zeros(0, 3)) for mean, each in ((0 * mu, a), (mu, b))]
    assert compared("fd", *sets)["fd_linear"] == pytest.approx(5 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([[(float(u @ v) / len(u) + 1) ** 3 for v in y] for u in x])


def test_kernel_distance_equals_brute_force() -> None:
    """One subset that is everything: the sums over all pairs, each image never with itself."""
    real, generated = gaussians(12), gaussians(12, shift=0.5, seed=1)
    kid = metric("kid", subsets=3, subset_size=6)
    random, expected = np.random.RandomState(2020), []
    x, y = (each.features.double().numpy() for each in (generated, real))
    for _ in range(3):
        u, v = (each[random.choice(12, 6, replace=False)] for each in (x, y))
        within = [sum(cubic(each, each)[i, j] for i in range(6) for j in range(6) if i != j) / 30 for each in (u, v)]
        expected.append(sum(within) - 2 * cubic(u, v).mean())
    result = kid.compare(real, generated)
    assert result.values["kd_linear"] == pytest.approx(np.mean(expected), rel=1e-9)
    assert result.intervals["kd_linear"] == pytest.approx(np.quantile(expected, [0.025, 0.975]), rel=1e-9)


def test_kernel_distance_is_unbiased_where_the_frechet_distance_is_not() -> None:
    """Sets of one distribution: KID scatters around 0, FD is far above it, the more so the fewer the images."""
    kernel = [compared("kid", gaussians(60, seed=i), gaussians(60, seed=i + 50))["kd_linear"] for i in range(30)]
    assert abs(np.mean(kernel)) < 3 * np.std(kernel) / np.sqrt(30)
    assert min(kernel) < 0
    few, many = (compared("fd", gaussians(n), gaussians(n, seed=1))["fd_linear"] for n in (20, 2000))
    assert few > 20 * many > 0


@pytest.mark.parametrize(("neighbours", "wider"), [(3, 5), (5, 3)])
def test_neighbours_equal_those_of_prdc(neighbours: int, wider: int) -> None:
    real, generated = gaussians(150), gaussians(90, shift=0.25, seed=1)
    values = compared("prdc", real, generated, neighbours=neighbours, wider=wider)
    x, y = (each.features.double().numpy() for each in (real, generated))
    near, wide = (prdc.compute_prdc(x, y, nearest_k=k) for k in (neighbours, wider))
    for name, expected in (("precision", near), ("recall", near), ("density", wide), ("coverage", wide)):
        assert values[f"{name}_linear"] == pytest.approx(expected[name], abs=1e-6)  # one image is 1/150
        assert 0.05 < expected[name] < 1.5, "a case where it says something"


def test_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = gaussians(50).features.double(), gaussians(40, 0.2, seed=1).features.double()
    full = density_coverage(real, generated, 5)
    monkeypatch.setattr("vqf.metrics.prdc.CHUNK_ROWS", 7)
    assert density_coverage(real, generated, 5) == full


def test_of_many_real_images_some_are_compared_with_all_generated_ones() -> None:
    """As ADM's evaluation does, whose reference batch has 10,000 images: every sample counts for the recall."""
    real, generated = gaussians(120), gaussians(90, 0.2, seed=1)
    values = compared("prdc", real, generated, images=40)
    subset, every = real.features[::3].double().numpy(), generated.features.double().numpy()
    near, wide = (prdc.compute_prdc(subset, every, nearest_k=k) for k in (3, 5))
    for name, expected in (("precision", near), ("recall", near), ("density", wide), ("coverage", wide)):
        assert values[f"{name}_linear"] == pytest.approx(expected[name], abs=1e-6)
    thinned = prdc.compute_prdc(subset, every[::2], nearest_k=3)
    assert thinned["recall"] != near["recall"], "a case where it matters"


def inception_score(logits: Tensor) -> float:
    p = torch.softmax(logits.double(), 1)
    q = p.mean(0)
    return float(torch.exp(sum((row * (row / q).log()).sum() for row in p) / len(p)))


def test_inception_score_by_its_formula() -> None:
    generated = gaussians(40)
    assert generated.logits is not None
    expected = inception_score(generated.logits)
    assert compared("is", gaussians(3), generated, splits=1)["score_linear"] == pytest.approx(expected, rel=1e-9)
    order = np.random.RandomState(2020).permutation(40)
    parts = [inception_score(generated.logits[order[i : i + 10]]) for i in range(0, 40, 10)]
    assert compared("is", gaussians(3), generated, splits=4)["score_linear"] == pytest.approx(np.mean(parts), rel=1e-9)


def test_the_best_inception_score_is_the_number_of_classes() -> None:
    sure = feature_set(torch.zeros(20, 2), torch.eye(5).repeat(4, 1) * 100)
    assert compared("is", sure, sure, splits=1)["score_linear"] == pytest.approx(5)


def test_what_cannot_be_compared_is_one_line() -> None:
    few, many = gaussians(4), gaussians(40)
    with pytest.raises(UserError, match="needs 6 images in each set; there are 4"):
        compared("prdc", many, few)
    with pytest.raises(UserError, match="4 images are fewer than splits=10"):
        compared("is", many, few)
    with pytest.raises(UserError, match="needs a classifier; linear has no class logits"):
        compared("is", many, feature_set(many.features))


def make_images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("name", "key"), [("fid", "rfd_linear"), ("kid", "kd_linear"), ("is", "score_linear")])
def test_as_a_metric_it_compares_reconstructions_with_their_originals(name: str, key: str, linear: Linear) -> None:
    originals, reconstructions, indices = (
        make_images(24, 0),
        make_images(24, 1),
        torch.zeros(24, 1, 1, dtype=torch.int64),
    )
    full, batched = metric(name), metric(name)
    full.update(Reconstruction(originals, reconstructions, indices))
    for i in range(0, 24, 7):
        batched.update(Reconstruction(originals[i : i + 7], reconstructions[i : i + 7], indices[i : i + 7]))
    sets = [feature_set(*linear(each)) for each in (originals, reconstructions)]
    expected = next(iter(metric(name).compare(*sets).values.values()))
    assert full.compute() == pytest.approx({key: expected}, rel=1e-5)
    assert batched.compute() == pytest.approx({key: expected}, rel=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_accumulators_moments_are_numpys_however_the_images_come(offset: float) -> None:
    class Offset(Linear):
        def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
            features = images.double().flatten(1) @ self.weights.double()  # in float32, rounding hangs on the batch
            return features + offset, features

    images = make_images(50, 0)
    accumulator = FeatureAccumulator(Offset(), count=50)
    for batch in images.split(7):
        accumulator.update(batch)
    result, features = accumulator.compute(), Offset()(images)[0].numpy()
    assert result.count == 50 and len(result.features) == 50
    np.testing.assert_allclose(result.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.covariance, np.cov(features, rowvar=False), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_of_many_features_some_are_kept_spread_evenly(size: int) -> None:
    network, images = Linear(), make_images(50, 0)
    accumulator = FeatureAccumulator(network, count=50, max_kept=20)
    for batch in images.split(size):
        accumulator.update(batch)
    result, features = accumulator.compute(), network(images)[0]
    assert len(result.features) == len(result.logits) == 20
    positions = [int((features - each).norm(dim=1).argmin()) for each in result.features]
    assert set(np.diff(positions)) == {2, 3}
    np.testing.assert_allclose(result.mean, features.double().mean(0), atol=1e-6)


def test_one_image_is_no_set() -> None:
    accumulator = FeatureAccumulator(Linear())
    accumulator.update(make_images(1, 0))
    with pytest.raises(UserError, match="a set of 1 images"):
        accumulator.compute()
    with pytest.raises(UserError, match="3 channels, not 1"):
        accumulator.update(torch.zeros(2, 1, 16, 16))
