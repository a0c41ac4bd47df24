"""Backbones of timm as encoders, as in UniTok and XQ-GAN.

UniTok: A Unified Tokenizer for Visual Generation and Understanding, https://arxiv.org/abs/2502.20321.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn

from vqf.batch import Size, pair
from vqf.errors import UserError, name_first
from vqf.networks.weights import read_weights
from vqf.options.ranges import Dimension
from vqf.registry import register

Stride = Annotated[int, Interval(ge=1, le=1024)]


@register("encoder", "timm")
class TimmEncoder(nn.Module):
    """Feature maps of a network of timm, projected to `dim`, as in UniTok, https://arxiv.org/abs/2502.20321.

    Good for codes that carry meaning, and with few images: the network knows many already. Where only the
    reconstruction counts, and there are many images, take `conv`: pretrained features leave out details. The decoder is
    any of the same stride: at 16, `model/decoder=conv` as it is.

    Pretrained weights are loaded where training starts; a checkpoint holds its own.

    Args:
        in_channels: Channels of the images. If they are 3, colors are normalized as for the network's weights.
        image_size: Size of the images; networks of one fixed size are built for it.
        dim: Channels of the latents.
        network: A name of `timm.list_models()`, or of `timm.list_pretrained()` for particular weights.
        stride: Pixels per cell: the last feature map of this stride.
        pretrained: Start from timm's weights, not from random ones.
        weights: File of the weights of timm's network; null takes them from timm's hub.
        frozen: Train the projection alone; the network stays in eval mode.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        in_channels: int,
        image_size: int | Size,
        *,
        dim: Dimension = 256,
        network: str = "convnext_tiny",
        stride: Stride = 16,
        pretrained: bool = True,
        weights: str | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.stride, self.network, self.frozen = dim, stride, network, frozen
        self.pretrained, self.weights = pretrained or weights is not None, weights
        self.options = {"in_chans": in_channels, "out_indices": (_level_of(network, stride),)}
        self.backbone, self.size_option = _create(network, pair(image_size), self.options)
        self.projection = nn.Conv2d(self.backbone.feature_info.channels()[-1], dim, 1)
        mean, std = _normalization(network) if in_channels == 3 else ((0.5,), (0.5,))
        self.register_buffer("shift", torch.tensor(mean).view(-1, 1, 1) * 2 - 1)
        self.register_buffer("scale", torch.tensor(std).view(-1, 1, 1) * 2)
        self.backbone.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "TimmEncoder":
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> Tensor:
        (features,) = self.backbone((images - self.shift) / self.scale)
        return self.projection(features)

    def load_pretrained(self) -> None:
        """Load timm's weights, if `pretrained`.

        Raises:
            UserError: If they cannot be had, or are of another network.
        """
        if not self.pretrained:
            return
        overlay = None if self.weights is None else {"state_dict": self._read(Path(self.weights).expanduser())}
        try:
            loaded = _timm_model(
                self.network, pretrained=True, pretrained_cfg_overlay=overlay, **self.options, **self.size_option
            )
        except (OSError, RuntimeError, ValueError) as error:
            source = f"{self.weights}: not the weights of timm's {self.network}"
            if self.weights is None:
                source = f"model.encoder.network={self.network}: cannot get its weights"
            raise UserError(
                f"{source} ({str(error).splitlines()[0]}); set model.encoder.weights=FILE, or "
                "model.encoder.pretrained=false to start from random ones"
            ) from error
        self.backbone.load_state_dict(loaded.state_dict())

    def _read(self, path: Path) -> dict[str, Tensor]:
        if not path.is_file():
            raise UserError(f"{path}: no such file; it should hold the weights of timm's {self.network}")
        weights = read_weights(path)
        names = [name.removeprefix("model.") for name in self.backbone.state_dict()]  # timm ignores absent ones
        if absent := [name for name in names if name not in weights]:
            raise UserError(f"{path}: not the weights of timm's {self.network}: it lacks {name_first(absent)}")
        return weights


def _create(network: str, size: Size, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Build a network without weights; return it, and the option that fits it to the images' size."""
    for size_option in ({"dynamic_img_size": True}, {"img_size": size}):  # transformers for any size, or for one
        try:
            return _timm_model(network, **options, **size_option), size_option
        except TypeError:  # it does not have the option
            continue
    return _timm_model(network, **options), {}


def _timm_model(network: str, **options: Any) -> Any:
    import timm

    return timm.create_model(network, features_only=True, feature_cls="getter", **options)


def _level_of(network: str, stride: int) -> int:
    """Index from the end, -1 and below, of the last feature map of a stride.

    Raises:
        ValueError: If there is no such network or map.
    """
    import timm

    names = timm.list_models() + timm.list_pretrained()
    if network not in names:
        close = " or ".join(f"'{name}'" for name in difflib.get_close_matches(network, names))
        hint = f"did you mean {close}? " if close else ""
        raise ValueError(f"network={network}: unknown to timm; {hint}timm.list_models() lists all")
    strides = _timm_model(network).feature_info.reduction()
    if stride not in strides:
        known = ", ".join(map(str, sorted(set(strides))))
        raise ValueError(f"stride={stride}: the feature maps of {network} have strides {known}")
    return -1 - strides[::-1].index(stride)


def _normalization(network: str) -> tuple[Any, Any]:
    """Mean and standard deviation of the colors in [0, 1] for which the weights are."""
    import timm

    config = timm.get_pretrained_cfg(network)
    return (config.mean, config.std) if config is not None else ((0.5,) * 3, (0.5,) * 3)
