"""Perceptual metrics: the losses of the same names, averaged over pictures."""

import numpy as np
import pytest
import skimage.data
import torch
from torchvision.models import vgg16

from vqf.protocols import Reconstruction
from vqf.registry import build


@pytest.fixture(scope="module")
def batch() -> Reconstruction:
    photo = skimage.data.coffee()
    pieces = np.stack([photo[50 * i : 50 * i + 48, 80 * i : 80 * i + 48] for i in range(5)])
    images = torch.from_numpy(pieces).permute(0, 3, 1, 2) / 127.5 - 1
    fakes = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return Reconstruction(images, fakes, torch.zeros(5, 2, 2, dtype=torch.int64))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    path = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    torch.save({f"features.{key}": value for key, value in vgg16().features.state_dict().items()}, path)
    return {"features": {"taps": [0, 1, 2, 3, 5]}, "lpips": {"weights": str(path)}}


@pytest.mark.parametrize(("name", "key"), [("features", "perceptual"), ("lpips", "lpips")])
def test_metric_is_the_loss_of_clamped_pictures_whatever_the_batch_size(
    batch: Reconstruction, options: dict[str, dict[str, object]], name: str, key: str
) -> None:
    node = {"name": name, **options[name]}
    whole, pieces = (build("metric", node, vocab_size=8, device=torch.device("cpu")) for _ in range(2))
    whole.update(batch)
    for i in range(0, 5, 2):
        pieces.update(Reconstruction(batch.images[i : i + 2], batch.reconstructions[i : i + 2], batch.indices))
    expected = float(build("loss", node).eval()(batch.reconstructions.clamp(-1, 1), batch.images))
    assert set(whole.compute()) == {key}
    assert whole.compute()[key] == pytest.approx(expected, rel=1e-6)
    assert pieces.compute()[key] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(float(build("loss", node).eval()(batch.reconstructions, batch.images)), rel=1e-5)


def test_no_graph_is_kept(batch: Reconstruction) -> None:
    metric = build("metric", {"name": "features"}, vocab_size=8, device=torch.device("cpu"))
    metric.update(Reconstruction(batch.images, batch.reconstructions.clone().requires_grad_(), batch.indices))
    assert not metric.mean.total.requires_grad
