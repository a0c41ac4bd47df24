"""PSNR and SSIM against scikit-image, and the batch size that must not matter."""

import numpy as np
import pytest
import skimage.data
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from tests.support.layouts import raster
from vqf.errors import UserError
from vqf.metrics import distortion
from vqf.metrics.running_mean import bootstrap_interval
from vqf.protocols import Metric, Reconstruction
from vqf.registry import build


def make_images(count: int = 7, height: int = 40, width: int = 33) -> Tensor:
    photo = skimage.data.astronaut()
    crops = [photo[40 * i : 40 * i + height, 55 * i : 55 * i + width] for i in range(count)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def batch() -> Reconstruction:
    generator = torch.Generator().manual_seed(0)
    images = make_images()
    scales = torch.linspace(0.02, 0.5, len(images)).view(-1, 1, 1, 1)
    fakes = images + scales * torch.randn(images.shape, generator=generator)
    masks = torch.rand(len(images), 1, 40, 33, generator=generator)
    masks[2, :, :20] = 0
    return Reconstruction(images, fakes, torch.zeros(len(images), 4, dtype=torch.int64), masks)


def slice_batch(batch: Reconstruction, start: int, stop: int) -> Reconstruction:
    masks = None if batch.masks is None else batch.masks[start:stop]
    return Reconstruction(batch.images[start:stop], batch.reconstructions[start:stop], batch.tokens[start:stop], masks)


def metric(name: str, **options: object) -> Metric:
    return build("metric", {"name": name, **options}, layout=raster((2, 2), 8), device=torch.device("cpu"))


def measure(name: str, *batches: Reconstruction) -> dict[str, float]:
    built = metric(name)
    for each in batches:
        built.update(each)
    return built.compute()


def as_arrays(batch: Reconstruction) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of originals and clamped reconstructions (H, W, 3) in [0, 1], float64."""
    pair = [(each.double().clamp(-1, 1) + 1) / 2 for each in (batch.images, batch.reconstructions)]
    return [tuple(each[i].permute(1, 2, 0).numpy() for each in pair) for i in range(len(batch.images))]


def test_psnr_equals_scikit_images(batch: Reconstruction) -> None:
    expected = np.mean([peak_signal_noise_ratio(x, y, data_range=1) for x, y in as_arrays(batch)])
    assert measure("psnr", batch)["psnr"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_large_images_are_compared_in_tiles(batch: Reconstruction, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(name, batch)
    monkeypatch.setattr(distortion, "TILE", 12)
    assert measure(name, batch) == pytest.approx(whole, abs=1e-10)


def test_pooled_psnr_is_that_of_all_images_as_one(batch: Reconstruction) -> None:
    x, y = (np.stack(each) for each in zip(*as_arrays(batch), strict=True))
    values = measure("psnr", batch)
    assert values["psnr_pooled"] == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1), abs=1e-9)
    assert values["psnr_pooled"] < values["psnr"]  # the logarithm is convex


def test_masked_psnr_counts_pixels_by_their_mask(batch: Reconstruction) -> None:
    expected = []
    for (x, y), mask in zip(as_arrays(batch), batch.masks.double(), strict=True):
        weights = np.repeat(mask[0].numpy()[..., None], 3, axis=2)
        expected.append(-10 * np.log10(np.average((x - y) ** 2, weights=weights)))
    assert measure("psnr", batch)["psnr_masked"] == pytest.approx(np.mean(expected), abs=1e-9)


def test_images_where_nothing_is_drawn_do_not_count(batch: Reconstruction) -> None:
    masks = batch.masks.clone()
    masks[0] = 0
    blank = Reconstruction(batch.images, batch.reconstructions, batch.tokens, masks)
    assert measure("psnr", blank)["psnr_masked"] == measure("psnr", slice_batch(blank, 1, 7))["psnr_masked"]


def test_images_without_masks_have_no_masked_psnr(batch: Reconstruction) -> None:
    bare = Reconstruction(batch.images, batch.reconstructions, batch.tokens)
    assert set(measure("psnr", bare)) == {"psnr", "psnr_pooled"}


def test_a_perfect_image_keeps_the_mean_finite(batch: Reconstruction) -> None:
    perfect = Reconstruction(batch.images, batch.images, batch.tokens, batch.masks)
    assert measure("psnr", perfect) == {"psnr": 100.0, "psnr_pooled": 100.0, "psnr_masked": 100.0}


def test_values_are_clamped_but_not_rounded() -> None:
    images = torch.full((1, 3, 16, 16), 1.0)
    beyond = Reconstruction(images, images + 5, torch.zeros(1, 4, dtype=torch.int64))
    slightly = Reconstruction(images, images - 1e-3, torch.zeros(1, 4, dtype=torch.int64))
    assert measure("psnr", beyond)["psnr"] == 100.0
    assert measure("psnr", slightly)["psnr"] == pytest.approx(-20 * np.log10(5e-4), abs=1e-3)


def test_ssim_equals_scikit_images(batch: Reconstruction) -> None:
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    expected = [structural_similarity(x, y, channel_axis=2, **options) for x, y in as_arrays(batch)]
    for i, value in enumerate(expected):
        assert measure("ssim", slice_batch(batch, i, i + 1))["ssim"] == pytest.approx(value, abs=1e-9)
    assert measure("ssim", batch)["ssim"] == pytest.approx(np.mean(expected), abs=1e-9)


def test_ssim_of_an_image_with_itself_is_one(batch: Reconstruction) -> None:
    assert measure("ssim", Reconstruction(batch.images, batch.images, batch.tokens))["ssim"] == pytest.approx(1)


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    tiny = torch.zeros(1, 3, 16, 10)
    with pytest.raises(UserError, match="not 16 x 10"):
        measure("ssim", Reconstruction(tiny, tiny, torch.zeros(1, 4, dtype=torch.int64)))


@pytest.mark.parametrize("name", ["psnr", "ssim"])
@pytest.mark.parametrize("size", [1, 3])
def test_batch_size_does_not_change_results(batch: Reconstruction, name: str, size: int) -> None:
    batches = [slice_batch(batch, i, i + size) for i in range(0, 7, size)]
    assert measure(name, *batches) == pytest.approx(measure(name, batch), abs=1e-12)


@pytest.mark.parametrize(("name", "keys"), [("psnr", {"psnr", "psnr_masked"}), ("ssim", {"ssim"})])
def test_intervals_are_of_the_means_over_images(batch: Reconstruction, name: str, keys: set[str]) -> None:
    full = metric(name)
    full.update(batch)
    single = [measure(name, slice_batch(batch, i, i + 1)) for i in range(7)]
    assert full.intervals().keys() == keys
    for key, interval in full.intervals().items():
        assert interval == pytest.approx(bootstrap_interval(np.array([values[key] for values in single])), abs=1e-9)
