"""Perceptual losses against the `lpips` package, and what a distance of this kind must do."""

from collections.abc import Callable
from pathlib import Path

import lpips
import numpy as np
import pytest
import skimage.data
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from vqf.errors import UserError
from vqf.losses.perceptual import LPIPS, FeatureLoss
from vqf.registry import build


def crops(size: int = 64) -> Tensor:
    """Sixteen crops of photos that come with scikit-image."""
    patches = []
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        image = getattr(skimage.data, name)()
        for i in range(4):
            top, left = 40 + 50 * i, 60 + 60 * i
            patches.append(image[top : top + size, left : left + size])
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2) / 127.5 - 1


def noise(images: Tensor, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (images + scale * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def blur(images: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * ((a - b) / 2).square().mean().log10())


@pytest.fixture(scope="module")
def peer() -> nn.Module:
    torch.manual_seed(0)
    return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).double().eval()


@pytest.fixture(scope="module")
def vgg_file(peer: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The peer's network in torchvision's names: the slices number their layers as torchvision does."""
    weights = {f"features.{key.split('.', 1)[1]}": value.float() for key, value in peer.net.state_dict().items()}
    torch.save(weights, path := tmp_path_factory.mktemp("vgg") / "vgg16.pth")
    return path


@pytest.fixture(scope="module")
def loss() -> FeatureLoss:
    return FeatureLoss()


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (37, 50)])
def test_lpips_and_its_gradient_equal_the_lpips_packages(
    peer: nn.Module, vgg_file: Path, size: tuple[int, int]
) -> None:
    ours = LPIPS(weights=str(vgg_file)).double()
    images = torch.rand(3, 3, *size, dtype=torch.float64) * 2 - 1
    fakes = (images + 0.2 * torch.randn_like(images)).requires_grad_()
    values = ours(fakes, images), peer(fakes, images).mean()
    torch.testing.assert_close(*values, rtol=1e-8, atol=0)
    gradients = [torch.autograd.grad(value, fakes)[0] for value in values]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-10)


def test_dropout_is_unbiased_noise_in_training_and_off_in_evaluation(vgg_file: Path) -> None:
    images = crops(32)[:2]
    exact, noisy = LPIPS(weights=str(vgg_file)), LPIPS(weights=str(vgg_file), dropout=True)
    fakes = noise(images, 0.3)
    assert torch.equal(noisy.eval()(fakes, images), exact.eval()(fakes, images))
    assert torch.equal(exact.train()(fakes, images), exact.eval()(fakes, images))
    noisy.train()
    torch.manual_seed(0)
    draws = torch.stack([noisy(fakes, images) for _ in range(30)])
    assert draws.std() > 0
    assert float(draws.mean()) == pytest.approx(float(exact(fakes, images)), abs=4 * float(draws.std()) / 30**0.5)


@pytest.mark.parametrize(
    "damage", [blur, noise, lambda images, x: images * (1 - x / 4)], ids=["blur", "noise", "fading"]
)
def test_more_damage_is_farther(loss: FeatureLoss, damage: Callable[[Tensor, float], Tensor]) -> None:
    images = crops()
    distances = [float(loss(damage(images, amount), images)) for amount in (0.0, 0.5, 1.0, 2.0)]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances == sorted(distances)
    assert distances[-1] > 10 * distances[0] + 0.1


def test_a_shift_is_closer_than_a_blur_though_its_psnr_is_lower(loss: FeatureLoss) -> None:
    images = crops(72)
    shifted, still = images[..., 4:68, 5:69], images[..., 4:68, 4:68]
    blurred = blur(still, 2.0)
    assert psnr(shifted, still) < psnr(blurred, still)
    assert loss(shifted, still) < loss(blurred, still)


def test_another_photo_is_farthest(loss: FeatureLoss) -> None:
    images = crops()
    assert loss(images.roll(4, 0), images) > 1.5 * loss(noise(images, 0.2), images)


def test_loss_is_the_mean_over_the_images(loss: FeatureLoss) -> None:
    images = crops()[:4]
    fakes = noise(images, 0.2)
    each = [loss(fakes[i : i + 1], images[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(loss(fakes, images), torch.stack(each).mean(), rtol=1e-5, atol=1e-6)


def test_gradient_reaches_the_reconstruction_alone(loss: FeatureLoss) -> None:
    images, fakes = crops()[:2].requires_grad_(), noise(crops()[:2], 0.2).requires_grad_()
    loss(fakes, images).backward()
    assert images.grad is None
    assert fakes.grad is not None
    assert fakes.grad.isfinite().all()
    assert (fakes.grad.flatten(1).norm(dim=1) > 0).all()


def test_following_the_gradient_brings_an_image_closer(loss: FeatureLoss) -> None:
    images = crops()[:4]
    fakes = blur(images, 1.0).requires_grad_()
    before = loss(fakes, images)
    (gradient,) = torch.autograd.grad(before, fakes)
    closer = fakes - 0.05 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert loss(closer, images) < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_lower_the_precision(loss: FeatureLoss, dtype: torch.dtype) -> None:
    images = crops()[:2].to(dtype)
    fakes = noise(images.float(), 0.1).to(dtype)
    expected = loss(fakes.float(), images.float())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(fakes, images)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


@pytest.mark.parametrize("size", [(32, 32), (33, 57), (64, 40)])
def test_any_size_is_compared(loss: FeatureLoss, size: tuple[int, int]) -> None:
    images = crops()[:1, :, : size[0], : size[1]]
    assert float(loss(noise(images, 0.2), images)) > 0.1


def test_blank_images_have_finite_gradients(loss: FeatureLoss) -> None:
    for value in (-1.0, 0.0, 1.0):
        fakes = torch.full((1, 3, 32, 32), value, requires_grad=True)
        loss(fakes, crops(32)[:1]).backward()
        assert fakes.grad is not None
        assert fakes.grad.isfinite().all()


def test_options_come_from_the_config() -> None:
    built = build("loss", {"name": "features", "weight": 0.25, "network": "lite2", "taps": [0, 2]})
    assert built.weight == 0.25
    assert len(built.distance.network.layers) == 3
    with pytest.raises(UserError, match="lite0"):
        build("loss", {"name": "features", "network": "lite1"})
    with pytest.raises(UserError, match="each an integer from 0 to 8"):
        build("loss", {"name": "features", "taps": [3, 11]})


def test_lpips_without_its_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file") as error:
        build("loss", {"name": "lpips", "weights": str(tmp_path / "absent.pth")})
    assert "\n" not in str(error.value)
