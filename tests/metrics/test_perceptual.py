"""Perceptual metrics: the losses of the same names, averaged over images."""

from pathlib import Path
from types import SimpleNamespace

import lpips
import numpy as np
import pytest
import skimage.data
import torch
import torchvision
from torchvision.models import vgg16

from tests.support.layouts import raster
from vqf.errors import UserError
from vqf.protocols import Reconstruction
from vqf.registry import build


@pytest.fixture(scope="module")
def batch() -> Reconstruction:
    photo = skimage.data.coffee()
    crops = np.stack([photo[50 * i : 50 * i + 48, 80 * i : 80 * i + 48] for i in range(5)])
    images = torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1
    fakes = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return Reconstruction(images, fakes, torch.zeros(5, 4, dtype=torch.int64))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    path = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    torch.save({f"features.{key}": value for key, value in vgg16().features.state_dict().items()}, path)
    return {"features": {"taps": [0, 1, 2, 3, 5]}, "lpips": {"weights": str(path)}}


@pytest.mark.parametrize(("name", "key"), [("features", "perceptual"), ("lpips", "lpips")])
def test_metric_is_the_loss_of_clamped_images_whatever_the_batch_size(
    batch: Reconstruction, options: dict[str, dict[str, object]], name: str, key: str
) -> None:
    node = {"name": name, **options[name]}
    full, batched = (build("metric", node, layout=raster((2, 2), 8), device=torch.device("cpu")) for _ in range(2))
    full.update(batch)
    for i in range(0, 5, 2):
        batched.update(Reconstruction(batch.images[i : i + 2], batch.reconstructions[i : i + 2], batch.tokens))
    expected = float(build("loss", node).eval()(batch.reconstructions.clamp(-1, 1), batch.images))
    assert set(full.compute()) == {key}
    assert full.compute()[key] == pytest.approx(expected, rel=1e-6)
    assert batched.compute()[key] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(float(build("loss", node).eval()(batch.reconstructions, batch.images)), rel=1e-5)


def test_no_graph_is_kept(batch: Reconstruction) -> None:
    metric = build("metric", {"name": "features"}, layout=raster((2, 2), 8), device=torch.device("cpu"))
    metric.update(Reconstruction(batch.images, batch.reconstructions.clone().requires_grad_(), batch.tokens))
    assert not metric.mean.total.requires_grad


@pytest.mark.parametrize("trunk", ["alex", "vgg", "squeeze"])
def test_lpips_equals_the_lpips_packages_on_every_trunk(
    batch: Reconstruction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trunk: str
) -> None:
    """One random trunk for both, since the real ones are downloads; the calibrated heads are real in both."""
    builder = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}[trunk]
    with torch.device("meta"):  # the classifiers above the trunks are large
        features = getattr(torchvision.models, builder)(weights=None).features
    features.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in features.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.reset_parameters()
    with monkeypatch.context() as patch:
        patch.setattr(lpips.pretrained_networks.tv, builder, lambda **_: SimpleNamespace(features=features))
        reference = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
    path = tmp_path / "trunk.pth"
    torch.save({f"features.{key}": value for key, value in features.state_dict().items()}, path)
    metric = build(
        "metric",
        {"name": "lpips", "network": trunk, "weights": str(path)},
        layout=raster((2, 2), 8),
        device=torch.device("cpu"),
    )
    metric.update(batch)
    with torch.no_grad():
        distances = reference(batch.images, batch.reconstructions.clamp(-1, 1)).flatten().numpy()
    key = "lpips" if trunk == "vgg" else f"lpips_{trunk}"
    assert metric.compute() == pytest.approx({key: distances.mean()}, rel=1e-5)
    low, high = metric.intervals()[key]
    assert distances.min() < low < distances.mean() < high < distances.max()


def test_trunks_are_not_mixed_up(batch: Reconstruction, options: dict[str, dict[str, object]]) -> None:
    with pytest.raises(UserError, match="not torchvision's AlexNet"):
        build(
            "metric", {"name": "lpips", "network": "alex", **options["lpips"]}, layout=raster((2, 2), 8), device="cpu"
        )
