"""Frozen networks that map an image to one feature vector.

`inception` is the network of FID, Inception-v3 of December 2015 (https://arxiv.org/abs/1512.00567), in
torch-fidelity's port. `lite2` is EfficientNet-Lite2. Any other name is a model of timm.
"""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqf.errors import UserError, closest_match
from vqf.hashing import sha256_of_file
from vqf.networks.perceptual import LITE_SCALE, LITE_SHIFT, efficientnet_lite_classifier, fold_batch_norms
from vqf.networks.weights import fingerprint, hub_file, read_weights
from vqf.protocols import FeatureNetwork

INCEPTION = "inception"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
OFFLINE_HINT = "metric=[fd_lite2] needs no download"
LITE2_SMALL_SIZE = 128  # pixels


@lru_cache(maxsize=4)
def feature_network(
    name: str, weights: str | None, expected_sha256: str | None, device: torch.device
) -> FeatureNetwork:
    """Build a feature network; metrics with equal arguments share one.

    Args:
        weights: File of its weights; None takes the published ones.
        expected_sha256: For Inception weights that are not the published ones.

    Raises:
        UserError: If there is no such network, or its weights are missing or wrong.
    """
    if name == INCEPTION:
        return InceptionV3(weights, expected_sha256).to(device)
    network = _lite2() if name == "lite2" else _timm(name, weights)
    return network.to(device).to(memory_format=torch.channels_last)


@contextmanager
def full_float32() -> Iterator[None]:
    """Turn TF32 off, whatever the run's settings."""
    flags = _precision_flags()
    before = [getattr(owner, name) for owner, name, _ in flags]
    try:
        for owner, name, value in flags:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(flags, before, strict=True):
            setattr(owner, name, value)


def _precision_flags() -> list[tuple[Any, str, Any]]:
    """Torch's precision flags as (owner, name, exact value); old flags and those of torch 2.9 do not mix."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return [(owner, "fp32_precision", "ieee") for owner in (matmul, cudnn.conv)]
    return [(owner, "allow_tf32", False) for owner in (matmul, cudnn)]


class FrozenNetwork(nn.Module):
    """A network that stays in eval mode."""

    name: str
    digest: str

    def freeze(self) -> None:
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenNetwork":
        return super().train(False)


class InceptionV3(FrozenNetwork):
    """FID's network: 2048 pooled features, and logits without bias."""

    name = INCEPTION

    def __init__(self, weights: str | None, expected_sha256: str | None) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        # The constructor unpickles its file, so it gets a copy of tensors that were read with weights_only=True.
        file = io.BytesIO()
        torch.save(_inception_weights(weights, expected_sha256), file)
        file.seek(0)
        taps = ["2048", "logits_unbiased"]
        try:
            self.network = FeatureExtractorInceptionV3(self.name, taps, feature_extractor_weights_path=file)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{weights}: not torch-fidelity's port of the Inception network: {reason}") from error
        self.digest = fingerprint(self.network)
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1], rounded to 8 bits -> features (B, 2048), logits (B, 1008)."""
        pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        with torch.autocast(images.device.type, enabled=False), full_float32():
            features, logits = self.network(pixels)
        return features, logits


class TimmClassifier(FrozenNetwork):
    """A classifier of timm: the input of its last layer, and its logits.

    Args:
        name: Suffix of the log keys.
        size: Side in pixels of its input; images are resized to it.
        mode: Interpolation of the resize, antialiased.
        shift: The input is (images - shift) / scale, with (3,) each.
        small_size: Input size for images up to this size.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        name: str,
        digest: str,
        network: Any,
        size: int,
        mode: str,
        shift: Tensor,
        scale: Tensor,
        small_size: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.network, self.size, self.mode, self.small_size = name, network, size, mode, small_size
        self.register_buffer("shift", shift.view(-1, 1, 1))
        self.register_buffer("scale", scale.view(-1, 1, 1))
        self.digest = f"{digest}-{size}-{small_size}-{mode}"
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) in [-1, 1] -> features (B, D), logits (B, C) or None."""
        size = self._input_size(max(images.shape[2:]))
        with torch.autocast(images.device.type, enabled=False), full_float32():
            x = images.float()
            if tuple(x.shape[2:]) != (size, size):
                x = F.interpolate(x, size=(size, size), mode=self.mode, antialias=True)
            x = ((x - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
            maps = self.network.forward_features(x)
            features = self.network.forward_head(maps, pre_logits=True)
            return features, self.network.forward_head(maps) if self.network.num_classes else None

    def _input_size(self, longer_side: int) -> int:
        return self.small_size if self.small_size is not None and longer_side <= self.small_size else self.size


def _inception_weights(weights: str | None, expected_sha256: str | None) -> dict[str, Tensor]:
    hint = f"metric.fid.weights=FILE (of kid, is and prdc likewise); {OFFLINE_HINT}"
    path = Path(weights).expanduser() if weights else hub_file(INCEPTION_URL, "the Inception weights of FID", hint)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; it should hold the Inception weights of FID ({INCEPTION_URL}); {OFFLINE_HINT}"
        )
    if (sha256 := sha256_of_file(path)) != (expected_sha256 or INCEPTION_SHA256):
        raise UserError(
            f"{path}: its sha256 is {sha256}, not {expected_sha256 or INCEPTION_SHA256}; FID uses {INCEPTION_URL}; "
            "give sha256=... for another file"
        )
    return read_weights(path)


def _lite2() -> TimmClassifier:
    network = efficientnet_lite_classifier("lite2")
    digest = fingerprint(network)
    shift, scale = torch.full((3,), LITE_SHIFT), torch.full((3,), LITE_SCALE)
    return TimmClassifier(
        "lite2", digest, fold_batch_norms(network), 260, "bicubic", shift, scale, small_size=LITE2_SMALL_SIZE
    )


def _timm(name: str, weights: str | None) -> TimmClassifier:
    import timm

    if not timm.is_model(name):
        close = closest_match(name, timm.list_models())
        hint = f" Did you mean '{close}'?" if close else ""
        raise UserError(f"network={name}: not inception, lite2 or a model of timm.{hint} timm.list_models() lists them")
    try:
        with _errors_only("huggingface_hub"):  # it logs a warning for every retry
            network = timm.create_model(name, pretrained=weights is None)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"network={name}: cannot get its weights ({reason}); give weights=FILE, or {OFFLINE_HINT}"
        ) from error
    if weights is not None:
        _load_weights(network, name, Path(weights).expanduser())
    data_config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(data_config[key]) for key in ("mean", "std"))
    mode = data_config["interpolation"] if data_config["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    digest = fingerprint(network, data_config["mean"], data_config["std"])
    return TimmClassifier(name, digest, network, max(data_config["input_size"][1:]), mode, 2 * mean - 1, 2 * std)


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load_weights(network: nn.Module, name: str, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; it should hold the weights of timm's {name}")
    try:
        network.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise UserError(f"{path}: not the weights of timm's {name}: {str(error).splitlines()[-1].strip()}") from error
