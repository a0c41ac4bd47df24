"""PatchGAN: sizes as published, patches, initialisation."""

import pytest
import torch

from vqf.discriminators.patchgan import PatchGAN


@pytest.mark.parametrize(("layers", "channels", "parameters"), [(3, 3, 2_765_633), (3, 1, 2_763_585), (2, 3, 663_361)])
def test_published_sizes(layers: int, channels: int, parameters: int) -> None:
    assert sum(p.numel() for p in PatchGAN(channels, layers=layers).parameters()) == parameters


@pytest.mark.parametrize(("layers", "side", "field"), [(3, 30, 70), (2, 62, 34)])
def test_patches(layers: int, side: int, field: int) -> None:
    net = PatchGAN(3, channels=8, layers=layers).eval()
    images = torch.zeros(1, 3, 256, 256, requires_grad=True)
    logits = net(images)
    assert logits.shape == (1, 1, side, side)
    logits[0, 0, side // 2, side // 2].backward()
    touched = images.grad.abs().sum(1)[0].nonzero()
    assert (touched.max(0).values - touched.min(0).values + 1).tolist() == [field, field]


def test_group_norm_keeps_images_apart() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    apart, mixed = PatchGAN(3, channels=8, layers=2, norm="group"), PatchGAN(3, channels=8, layers=2)
    torch.testing.assert_close(apart(images)[:1], apart(images[:1]))
    assert (mixed(images)[:1] - mixed(images[:1])).abs().max() > 1e-3


def test_initialisation() -> None:
    torch.manual_seed(0)
    net = PatchGAN(3)
    assert float(net.main[2].weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(net.main[3].weight.detach().mean()) == pytest.approx(1.0, abs=0.01)
    assert float(net.main[3].bias.detach().abs().max()) == 0.0


def test_spectral_norm_bounds_every_convolution() -> None:
    """After some power iterations the largest singular value of each weight, out x (in, kh, kw), is 1."""
    torch.manual_seed(0)
    net = PatchGAN(3, channels=8, layers=2, norm="none", spectral_norm=True)
    for _ in range(60):
        net(torch.randn(2, 3, 32, 32))
    convolutions = [module for module in net.eval().modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 4
    for convolution in convolutions:
        largest = torch.linalg.svdvals(convolution.weight.detach().flatten(1).double())[0]
        assert float(largest) == pytest.approx(1, rel=2e-2)
        assert convolution.bias is not None


def test_spectral_norm_resumes_with_its_vectors() -> None:
    torch.manual_seed(0)
    first, second = (PatchGAN(3, channels=8, layers=2, spectral_norm=True) for _ in range(2))
    images = torch.randn(2, 3, 32, 32)
    first(images)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images), second(images))


def test_blur_makes_logits_follow_a_shift() -> None:
    """By two cells of the last grid: logits of a shifted image are those of the image, shifted; by less, nearly so."""
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(1, 3, 80, 80), scale_factor=2.0, mode="bilinear")

    def change(net: PatchGAN) -> float:
        net.eval()
        with torch.no_grad():
            here, there = net(images[..., :128, :128]), net(images[..., 1:129, 1:129])
        return float((here - there)[..., 4:-4, 4:-4].abs().mean() / here.std())

    plain, blurred = (PatchGAN(3, channels=16, layers=2, norm="group", blur=blur) for blur in (False, True))
    assert blurred(images).shape[-1] == plain(images).shape[-1]
    assert change(blurred) < 0.8 * change(plain)
