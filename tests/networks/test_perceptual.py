"""Frozen networks: outputs as published, frozen in training, wrong files refused."""

import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import vgg16 as torchvision_vgg16
from torchvision.models._meta import _IMAGENET_CATEGORIES as CLASSES

from vqf.errors import UserError
from vqf.networks import perceptual
from vqf.networks.perceptual import (
    PerceptualDistance,
    efficientnet_lite,
    efficientnet_lite_classifier,
    lpips_heads,
    unit_normalize,
    vgg16_features,
)
from vqf.networks.weights import verify_checksum

CATS = {"tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"}


def photo(name: str, size: int) -> Tensor:
    image = Image.fromarray(getattr(skimage.data, name)())
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.fixture(scope="module")
def vgg_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    with torch.device("meta"):
        network = torchvision_vgg16().features
    network.to_empty(device="cpu")
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    return {f"features.{key}": value for key, value in network.state_dict().items()}


@pytest.mark.parametrize(("name", "size"), [("lite0", 224), ("lite2", 260)])
def test_lite_knows_what_photos_show(name: perceptual.EfficientNetLite, size: int) -> None:
    network, classify = efficientnet_lite(name, [8]), efficientnet_lite_classifier(name).classifier
    answers = [
        CLASSES[int(classify(network(photo(each, size))[0].mean((2, 3))).argmax())] for each in ("coffee", "chelsea")
    ]
    assert answers[0] == "espresso"
    assert answers[1] in CATS


def test_every_tap_is_the_output_of_timms_own_stage() -> None:
    images = photo("coffee", 96)
    classifier = efficientnet_lite_classifier("lite0")
    x = classifier.bn1(classifier.conv_stem((images * 127.5 + 127.5 - 127) / 128))
    expected = [x]
    for stage in classifier.blocks:
        expected.append(x := stage(x))
    expected.append(classifier.bn2(classifier.conv_head(x)))
    for y, y0 in zip(efficientnet_lite("lite0", range(9))(images), expected, strict=True):
        torch.testing.assert_close(y, y0, rtol=1e-3, atol=1e-3)


def test_folding_the_batch_norm_changes_neither_values_nor_gradients() -> None:
    plain, folded = (efficientnet_lite_classifier("lite0").double() for _ in range(2))
    for parent in folded.modules():
        perceptual._fold_batch_norm(parent)
    assert not any(isinstance(each, nn.BatchNorm2d) for each in folded.modules())
    images = [photo("coffee", 64).double().requires_grad_() for _ in range(2)]
    outputs = [network(each) for network, each in zip((plain, folded), images, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y, x in zip(outputs, images, strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


def test_networks_are_cut_after_the_last_tap() -> None:
    images = photo("chelsea", 64)
    short, long = efficientnet_lite("lite0", [0, 2]), efficientnet_lite("lite0", range(9))
    assert len(short.layers) == 3
    for y, y0 in zip(short(images), [long(images)[i] for i in (0, 2)], strict=True):
        assert torch.equal(y, y0)


def test_networks_stay_frozen_inside_a_parent_that_trains() -> None:
    parent = nn.ModuleList([efficientnet_lite("lite0", [2])])
    parent.train()
    assert not any(each.training for each in parent[0].modules())
    assert not any(each.requires_grad for each in parent.parameters())
    images = photo("coffee", 64).requires_grad_()
    parent[0](images)[0].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("taps", [[], [9], [-1], [0, 12]])
def test_taps_that_do_not_exist_are_refused(taps: list[int]) -> None:
    with pytest.raises(ValueError, match="layers 0 to 8"):
        efficientnet_lite("lite0", taps)


def test_a_damaged_weight_file_is_refused(tmp_path: Path) -> None:
    package, name = perceptual.LITE_FILES["lite0"]
    source = Path(__import__(package).__file__).parent / "models" / name
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    assert verify_checksum(source) == source
    with pytest.raises(UserError, match="damaged"):
        verify_checksum(tmp_path / name)


def test_a_position_without_any_feature_has_a_finite_gradient() -> None:
    zeros = torch.zeros(1, 4, 2, 2, requires_grad=True)
    (unit_normalize(zeros) - 1).square().sum().backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


def test_units_have_length_one() -> None:
    y = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(
        unit_normalize(y).norm(dim=1), torch.ones(2, 3, 3, dtype=torch.float64), rtol=1e-9, atol=0
    )


def test_heads_of_lpips_fit_vgg16() -> None:
    heads = lpips_heads()
    assert [len(head) for head in heads] == [64, 128, 256, 512, 512]
    assert all((head >= 0).all() for head in heads)


def test_changed_heads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(perceptual.BACKBONES, "vgg", replace(perceptual.BACKBONES["vgg"], heads_sha256="0" * 64))
    with pytest.raises(UserError, match="reinstall lpips"):
        lpips_heads()


def test_distance_is_the_mean_over_positions_of_squared_differences_of_units() -> None:
    images, others = photo("coffee", 64).double(), photo("chelsea", 64).double()
    distance = PerceptualDistance(efficientnet_lite("lite0", [0, 3]).double())
    expected = 0.0
    with torch.no_grad():
        for y, y0 in zip(distance.network(others), distance.network(images), strict=True):
            for i in range(y.shape[2]):
                for j in range(y.shape[3]):
                    u, v = y[0, :, i, j] / y[0, :, i, j].norm(), y0[0, :, i, j] / y0[0, :, i, j].norm()
                    expected += float((u - v).square().sum()) / (y.shape[2] * y.shape[3])
    assert float(distance(others, images)) == pytest.approx(expected, rel=1e-8)


def test_vgg16_reads_both_formats_and_forgets_the_classifier(tmp_path: Path, vgg_weights: dict[str, Tensor]) -> None:
    weights = {**vgg_weights, "classifier.0.bias": torch.zeros(3)}
    torch.save(weights, tmp_path / "vgg.pth")
    save_file(weights, tmp_path / "vgg.safetensors")
    images = photo("coffee", 32)
    old, new = vgg16_features(tmp_path / "vgg.pth")(images), vgg16_features(tmp_path / "vgg.safetensors")(images)
    assert [y.shape[1:] for y in old] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    assert all(torch.equal(*each) for each in zip(old, new, strict=True))


def test_vgg16_refuses_other_files(tmp_path: Path, vgg_weights: dict[str, Tensor]) -> None:
    torch.save({**vgg_weights, "features.2.weight": torch.zeros(3, 3)}, tmp_path / "shape.pth")
    torch.save({"a": torch.zeros(3)}, tmp_path / "keys.pth")
    torch.save({f"features.{i}": Path("x") for i in range(3)}, tmp_path / "code.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    messages = {"shape": "features.2.weight", "keys": "not torchvision's VGG16", "code": "not a weight file"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=message) as error:
            vgg16_features(tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not a weight file"):
        vgg16_features(tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="no such file"):
        vgg16_features(tmp_path / "absent.pth")


def test_vgg16_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(UserError) as error:
        vgg16_features()
    message = str(error.value)
    assert "\n" not in message
    for words in (perceptual.BACKBONES["vgg"].url, "vgg16-397923af.pth", "model.loss.lpips.weights=FILE"):
        assert words in message


def test_vgg16_refuses_a_damaged_file_in_the_hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").write_bytes(b"half a file")
    with pytest.raises(UserError, match="damaged"):
        vgg16_features()
