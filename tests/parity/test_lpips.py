"""LPIPS, with one random VGG16 for all sides (the real one is a download of 528 MB) and the real calibrated heads."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.comparisons import compares
from tests.parity.peers import need, taming_lpips, trunk
from vqf.losses.perceptual import LPIPS
from vqf.networks.perceptual import unit_normalize


def make_image_pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images = torch.rand(2, 3, 48, 32, dtype=dtype) * 2 - 1
    return (images + 0.3 * torch.randn_like(images)).requires_grad_(), images


def package(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(need("lpips").pretrained_networks.tv, "vgg16", lambda **_: trunk())
        return need("lpips").LPIPS(net="vgg", pnet_rand=True, verbose=False).to(dtype)


def one_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout whose mask depends on the seed and the shape alone, not on the order of the numbers in memory."""
    return x * (torch.rand(x.shape, dtype=torch.float64) >= p).to(x) / (1 - p) if training else x


@compares("loss `lpips`", "lpips `LPIPS(net='vgg')`", "distance")
@compares("loss `lpips`", "lpips `LPIPS(net='vgg')`", "gradient of the reconstructions", exact=True)
@pytest.mark.parametrize("epsilon", ["under", "beside"])
def test_lpips_package(
    dtype: torch.dtype, epsilon: Any, vgg_file: str, monkeypatch: pytest.MonkeyPatch, record: Any
) -> None:
    """48 x 32 pixels; the heads are v0.1 in both; the epsilon under the root and beside it."""
    reconstructions, images = make_image_pair(dtype)
    expected = package(dtype, monkeypatch)(images, reconstructions).mean()
    found = LPIPS(weights=vgg_file, epsilon=epsilon).to(dtype)(reconstructions, images)
    record("distance", found, expected)
    at_reconstructions = [torch.autograd.grad(each, reconstructions)[0] for each in (found, expected)]
    record("gradient of the reconstructions", *at_reconstructions)


@compares("loss `lpips`", "taming `LPIPS`", "distance in eval mode", "distance in train mode")
def test_taming(dtype: torch.dtype, vgg_file: str, monkeypatch: pytest.MonkeyPatch, record: Any) -> None:
    """The reference trains with dropout 0.5 on the squared differences, because its loss follows the model into train
    mode; `dropout=true` brings that back (one mask on both sides), the default is the exact distance."""
    theirs = taming_lpips()().to(dtype)
    reconstructions, images = make_image_pair(dtype)
    exact = LPIPS(weights=vgg_file).to(dtype).train()
    noisy = LPIPS(weights=vgg_file, dropout=True).to(dtype).train()
    found = exact(reconstructions, images)
    record("distance in eval mode", found, theirs.eval()(images, reconstructions).mean())
    torch.testing.assert_close(noisy.eval()(reconstructions, images), found)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", one_dropout)
        torch.manual_seed(1)
        expected = theirs.train()(images, reconstructions).mean()
        torch.manual_seed(1)
        record("distance in train mode", noisy.train()(reconstructions, images), expected)
    assert not torch.isclose(expected, found, rtol=1e-3)


def test_where_features_are_zero() -> None:
    """The package divides by the root of a sum that may be 0, whose gradient is then not a number."""
    zero = torch.zeros(1, 4, 2, 2, requires_grad=True)
    (published,) = torch.autograd.grad(need("lpips").normalize_tensor(zero).sum(), zero)
    (found,) = torch.autograd.grad(unit_normalize(zero).sum(), zero)
    assert published.isnan().all()
    assert found.isfinite().all()
