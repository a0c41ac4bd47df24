"""Feature networks: weights are verified, and features equal those of the original implementations."""

import urllib.error
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.networks.test_perceptual import photo
from tests.support.inception import random_inception, write_inception
from tests.support.layouts import raster
from vqf.errors import UserError
from vqf.networks import feature_extractors
from vqf.networks.feature_extractors import InceptionV3, TimmClassifier, feature_network
from vqf.networks.perceptual import efficientnet_lite, efficientnet_lite_classifier
from vqf.registry import build

CPU = torch.device("cpu")


class File(NamedTuple):
    path: Path
    sha256: str


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> File:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    return File(path, write_inception(path))


def noise() -> Tensor:
    return torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_inception_sees_what_torch_fidelitys_sees_in_the_8_bit_pixels(file: File) -> None:
    network = feature_network("inception", str(file.path), file.sha256, CPU)
    images = noise()
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    features, logits = random_inception()(pixels)
    outputs = network(images)
    assert features.std() > 0.01, "a network that says something"
    assert outputs[0].shape == (1, 2048) and outputs[1] is not None and outputs[1].shape == (1, 1008)
    torch.testing.assert_close(outputs[0], features)
    torch.testing.assert_close(outputs[1], logits)
    exact = network(pixels.float() / 127.5 - 1)
    assert torch.equal(exact[0], outputs[0]), "pixels that are rounded already stay as they are"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(images)[0], outputs[0])


def test_inception_takes_no_other_file(file: File, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"its sha256 is {file.sha256}, not {feature_extractors.INCEPTION_SHA256}"):
        InceptionV3(str(file.path), None)
    damaged = bytearray(file.path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pth").write_bytes(damaged)
    with pytest.raises(UserError, match=f"not {file.sha256}"):
        InceptionV3(str(tmp_path / "damaged.pth"), file.sha256)
    with pytest.raises(UserError, match="no such file; it should hold the Inception weights of FID"):
        InceptionV3(str(tmp_path / "absent.pth"), None)


def test_inception_says_what_a_file_of_other_weights_lacks(tmp_path: Path) -> None:
    from vqf.hashing import sha256_of_file

    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not torch-fidelity's port of the Inception network") as error:
        InceptionV3(str(tmp_path / "other.pth"), sha256_of_file(tmp_path / "other.pth"))
    assert "\n" not in str(error.value)


def test_a_file_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    from vqf.hashing import sha256_of_file

    torch.save({"fc.bias": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="not a weight file"):
        InceptionV3(str(tmp_path / "code.pth"), sha256_of_file(tmp_path / "code.pth"))


def test_fid_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(UserError) as error:
        build("metric", {"name": "fid"}, layout=raster((2, 2), 8), device="cpu")
    message = str(error.value)
    assert "\n" not in message
    path = str(tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth")
    for words in (feature_extractors.INCEPTION_URL, path, "metric.fid.weights=FILE", "metric=[fd_lite2]"):
        assert words in message


def test_fid_refuses_a_damaged_file_in_the_hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"half a file")
    with pytest.raises(UserError, match="its sha256 is"):
        InceptionV3(None, None)


def test_metrics_share_one_network(file: File) -> None:
    options = {"weights": str(file.path), "sha256": file.sha256}
    fid, kid = (
        build("metric", {"name": name, **options}, layout=raster((2, 2), 8), device="cpu") for name in ("fid", "kid")
    )
    assert fid.network is kid.network


@pytest.mark.parametrize(("size", "seen"), [(32, 128), (128, 128), (200, 260)])
def test_lite2_describes_images_by_its_last_layer_at_one_of_two_sizes(size: int, seen: int) -> None:
    network, images = feature_network("lite2", None, None, CPU), photo("coffee", size)
    scaled = images
    if size != seen:
        scaled = torch.nn.functional.interpolate(images, size=(seen, seen), mode="bicubic", antialias=True)
    features, logits = network(images)
    expected = efficientnet_lite("lite2", [8])(scaled)[0].mean((2, 3))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, efficientnet_lite_classifier("lite2").classifier(expected), rtol=1e-3, atol=1e-3)
    assert network.name == "lite2" and network.digest.endswith("-260-128-bicubic")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "resnet.safetensors"
    save_file(timm.create_model("test_resnet.r160_in1k").state_dict(), path)
    return path


def test_any_model_of_timm_sees_images_as_it_was_trained(resnet: Path) -> None:
    network, images = feature_network("test_resnet.r160_in1k", str(resnet), None, CPU), photo("coffee", 64)
    assert isinstance(network, TimmClassifier)
    reference = timm.create_model("test_resnet.r160_in1k").eval()
    reference.load_state_dict(network.network.state_dict())
    data_config = timm.data.resolve_model_data_config(reference)
    size, mean, std = data_config["input_size"][1:], torch.tensor(data_config["mean"]), torch.tensor(data_config["std"])
    unit = torch.nn.functional.interpolate(
        (images + 1) / 2, size=size, mode=data_config["interpolation"], antialias=True
    )
    inputs = (unit - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    features, logits = network(images)
    torch.testing.assert_close(logits, reference(inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reference.get_classifier()(features), logits, rtol=1e-4, atol=1e-5)


def test_other_weights_have_another_digest(resnet: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet.r160_in1k").state_dict(), tmp_path / "other.safetensors")
    names = ("test_resnet.r160_in1k", "test_resnet.r160_in1k")
    first, other = (
        feature_network(name, str(path), None, CPU)
        for name, path in zip(names, (resnet, tmp_path / "other.safetensors"), strict=True)
    )
    assert first.digest != other.digest


def test_networks_that_cannot_be_had_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route\nand much more")

    monkeypatch.setattr(timm, "create_model", offline)
    messages = {}
    for name, weights in (("resnet5O", None), ("resnet50", None)):
        with pytest.raises(UserError) as error:
            feature_network(name, weights, None, CPU)
        messages[name] = str(error.value)
        assert "\n" not in messages[name]
    assert "Did you mean 'resnet50'?" in messages["resnet5O"]
    assert "weights=FILE" in messages["resnet50"] and "metric=[fd_lite2]" in messages["resnet50"]


def test_weights_of_another_model_are_refused(resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the weights of timm's test_vit"):
        feature_network("test_vit.r160_in1k", str(resnet), None, CPU)
    with pytest.raises(UserError, match="no such file"):
        feature_network("test_vit.r160_in1k", str(tmp_path / "absent"), None, CPU)


class Switch:
    """A stand-in for an object with torch's precision flags."""

    def __init__(self, **flags: object) -> None:
        self.__dict__.update(flags)


@pytest.mark.parametrize(("flags", "exact"), [({"fp32_precision": "tf32"}, "ieee"), ({"allow_tf32": True}, False)])
def test_a_network_of_a_measure_computes_in_float32_whatever_a_run_allows(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, object], exact: object
) -> None:
    """With the named flags since torch 2.9, and with the boolean ones before."""
    ((name, allowed),) = flags.items()
    matmul, convolution = Switch(**flags), Switch(**flags)
    cudnn = Switch(conv=convolution, **flags)
    monkeypatch.setattr(torch.backends, "cuda", Switch(matmul=matmul))
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    owners = [matmul, cudnn if name == "allow_tf32" else convolution]
    with feature_extractors.full_float32():
        assert [getattr(each, name) for each in owners] == [exact, exact]
    assert [getattr(each, name) for each in owners] == [allowed, allowed]


@pytest.mark.filterwarnings("error")
def test_setting_the_flags_gives_no_warning() -> None:
    before = torch.get_float32_matmul_precision()
    with feature_extractors.full_float32():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


def test_networks_look_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(feature_extractors, "full_float32", lambda: seen.append("asked") or nullcontext())
    feature_network("lite2", None, None, CPU)(noise())
    assert seen == ["asked"]
