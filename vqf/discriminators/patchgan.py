"""PatchGAN, a discriminator over overlapping patches.

Image-to-Image Translation with Conditional Adversarial Networks, https://arxiv.org/abs/1611.07004.
"""

from typing import Annotated, Literal

from annotated_types import Interval
from torch import Tensor, nn

from vqf.discriminators.sync_batchnorm import SyncBatchNorm2d
from vqf.options.ranges import Dimension
from vqf.registry import register


@register("discriminator", "patchgan")
class PatchGAN(nn.Module):
    """Convolutional discriminator with one logit per patch, https://arxiv.org/abs/1611.07004.

    The receptive field is 70 pixels with 3 layers, 34 with 2.

    Args:
        in_channels: Channels of the images.
        channels: Width of the first layer (ndf); it doubles with every layer, up to eight times.
        layers: Number of strided layers (n_layers).
        norm: "batch" as published: each process normalizes by its own images. "sync_batch" uses the statistics of all
            processes, with the same weights. "group" keeps images independent: better for small batches and for
            gradient accumulation. "none" is for `spectral_norm`.
        spectral_norm: Divide the weights of every convolution by their largest singular value
            (https://arxiv.org/abs/1802.05957), which bounds the slope of the logits: a discriminator that cannot win
            at once.
        blur: Halve the size by a convolution of stride 1 and a binomial filter (https://arxiv.org/abs/1904.11486), as
            MaskGIT's and MAGVIT-2's discriminators do: logits change little when the image moves by a pixel.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        channels: Dimension = 64,
        layers: Annotated[int, Interval(ge=0, le=16)] = 3,
        norm: Literal["batch", "sync_batch", "group", "none"] = "batch",
        spectral_norm: bool = False,
        blur: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        net: list[nn.Module] = [*_conv(in_channels, channels, 2, blur, bias=True), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            net += _conv(widths[i - 1], widths[i], 2 if i < layers else 1, blur, bias=norm == "none")
            net += [*_norm(norm, widths[i]), nn.LeakyReLU(0.2)]
        net.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.main = nn.Sequential(*net)
        self.apply(_init_weights)
        if spectral_norm:
            for module in self.main:
                if isinstance(module, nn.Conv2d):
                    nn.utils.parametrizations.spectral_norm(module)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits (B, 1, h, w)."""
        return self.main(images)


def _conv(source: int, target: int, stride: int, blur: bool, bias: bool) -> list[nn.Module]:
    if not blur or stride == 1:
        return [nn.Conv2d(source, target, 4, stride, 1, bias=bias)]
    from timm.layers import BlurPool2d

    return [nn.Conv2d(source, target, 3, 1, 1, bias=bias), BlurPool2d(target, filt_size=3, stride=stride)]


def _norm(kind: str, channels: int) -> list[nn.Module]:
    if kind == "none":
        return []
    if kind == "group":
        return [nn.GroupNorm(8, channels)]
    return [SyncBatchNorm2d(channels) if kind == "sync_batch" else nn.BatchNorm2d(channels)]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
