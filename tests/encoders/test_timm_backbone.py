"""Backbones of timm: their features, strides, weights, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import vqf
from tests.support.composing import compose
from vqf.encoders.timm_backbone import TimmEncoder
from vqf.errors import UserError
from vqf.models.tokenizer import build_tokenizer
from vqf.pipelines.stage1 import Stage1
from vqf.registry import build

# One of each of timm's ways to give features: by layers, from within a transformer, channels last, EfficientNet's.
NETWORKS = {"test_resnet": 16, "test_vit": 16, "test_convnext": 16, "test_efficientnet": 16, "test_mambaout": 8}


def make(
    network: str, stride: int, *, in_channels: int = 3, size: tuple[int, int] = (64, 96), **more: Any
) -> TimmEncoder:
    torch.manual_seed(0)
    node = {"name": "timm", "dim": 5, "network": network, "stride": stride, **more}
    return build("encoder", node, in_channels=in_channels, image_size=size).eval()


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("network", "stride"), NETWORKS.items())
@torch.no_grad()
def test_the_features_are_those_of_timm(network: str, stride: int) -> None:
    encoder, images = make(network, stride), noise(2, 3, 64, 96)
    peer = timm.create_model(network, **encoder.size_option).eval()
    weights = {key.removeprefix("model."): value for key, value in encoder.backbone.state_dict().items()}
    assert weights and not peer.load_state_dict(weights, strict=False).unexpected_keys
    config = timm.get_pretrained_cfg(network)
    assert config is not None
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (config.mean, config.std))
    maps = peer.forward_intermediates(((images + 1) / 2 - mean) / std, intermediates_only=True)
    expected = [each for each in maps if each.shape[2:] == (64 // stride, 96 // stride)][-1]
    weight, bias = encoder.projection.weight[:, :, 0, 0], encoder.projection.bias
    assert bias is not None
    latents = torch.einsum("oc,bchw->bohw", weight, expected) + bias[:, None, None]
    assert latents.shape == (2, 5, 64 // stride, 96 // stride)
    torch.testing.assert_close(encoder(images), latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_reach_every_parameter(network: str) -> None:
    encoder = make(network, NETWORKS[network]).train()
    encoder(noise(2, 3, 64, 96)).square().sum().backward()
    assert [key for key, parameter in encoder.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("stride", [2, 4, 8, 16, 32])
def test_the_stride_chooses_the_feature_map(stride: int) -> None:
    assert make("test_resnet", stride)(noise(1, 3, 64, 96)).shape == (1, 5, 64 // stride, 96 // stride)


def test_frozen_trains_the_projection_alone() -> None:
    encoder = make("test_resnet", 4, frozen=True).train()
    assert [key for key, each in encoder.named_parameters() if each.requires_grad] == [
        "projection.weight",
        "projection.bias",
    ]
    before = encoder.backbone.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    encoder(noise(2, 3, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in encoder.backbone.state_dict().items())
    tuned = make("test_resnet", 4).train()
    tuned(noise(2, 3, 32, 32))
    assert any(not torch.equal(value, before[key]) for key, value in tuned.backbone.state_dict().items())


@pytest.mark.parametrize("network", ["test_resnet", "test_vit"])
def test_weights_of_the_full_network_are_read_from_a_file(network: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = timm.create_model(network).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    encoder = make(network, 16, weights=str(tmp_path / "weights.safetensors"), size=(160, 160))

    def equal() -> list[bool]:
        found = encoder.backbone.state_dict().items()
        return [torch.equal(value, weights[key.removeprefix("model.")]) for key, value in found]

    assert not all(equal())
    encoder.load_pretrained()
    assert all(equal())


def test_wrong_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.pt: no such file; it should hold the weights of timm's test_resnet"):
        make("test_resnet", 16, weights=str(tmp_path / "none.pt")).load_pretrained()
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: not the weights of timm's test_resnet") as caught:
        make("test_resnet", 16, weights=str(tmp_path / "other.safetensors")).load_pretrained()
    assert "\n" not in str(caught.value)


def test_without_network_it_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host\nmore")

    encoder = make("test_resnet", 16)
    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(UserError) as caught:
        encoder.load_pretrained()
    assert str(caught.value) == (
        "model.encoder.network=test_resnet: cannot get its weights (no route to host); set model.encoder.weights=FILE, "
        "or model.encoder.pretrained=false to start from random ones"
    )


def test_random_weights_need_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make("test_resnet", 16, pretrained=False)
    before = encoder.projection.weight.clone()
    monkeypatch.setattr("timm.create_model", None)
    encoder.load_pretrained()
    assert torch.equal(encoder.projection.weight, before)


@pytest.mark.parametrize("in_channels", [1, 5])
def test_images_of_other_channels(in_channels: int) -> None:
    encoder, images = make("test_resnet", 16, in_channels=in_channels), noise(1, in_channels, 32, 32)
    torch.testing.assert_close((images - encoder.shift) / encoder.scale, images)
    assert encoder(images).shape == (1, 5, 2, 2)


def test_what_timm_does_not_have_is_one_line() -> None:
    with pytest.raises(UserError, match="network=resnet1: unknown to timm; did you mean 'resnet18' or") as caught:
        make("resnet1", 16)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="stride=3: the feature maps of test_resnet have strides 2, 4, 8, 16, 32"):
        make("test_resnet", 3)


def test_it_is_paired_with_the_conv_decoder_as_it_is() -> None:
    chosen = ["model/encoder=timm", "model.encoder.network=test_resnet", "model.decoder.channels=32"]
    config = compose("model=vqvae", *chosen)
    tokenizer = build_tokenizer(config.model, 32)
    assert tokenizer.stride == 16 and tokenizer(noise(1, 3, 32, 32)).reconstructions.shape == (1, 3, 32, 32)


def test_training_starts_from_the_weights_and_a_checkpoint_needs_no_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights, file = timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors"
    save_file(weights, file)
    chosen = ["model/encoder=timm", "model.encoder.network=test_resnet", "model.encoder.stride=4"]
    chosen += [f"model.encoder.weights={file}", "model.encoder.frozen=true", "model.decoder.multipliers=[1,1,1]"]
    chosen += ["model.decoder.channels=8", "data=emoji", "image_size=16", "batch_size=2", "steps=1", "device=cpu"]
    Stage1(compose("model=vqvae", "metric=[]", *chosen), tmp_path / "run").run()
    file.unlink()
    encoder = vqf.load(tmp_path / "run").encoder
    assert isinstance(encoder, TimmEncoder)
    found = encoder.backbone.state_dict()
    assert all(torch.equal(found[key], weights[key.removeprefix("model.")]) for key in found)
