"""Premultiplied RGBA images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.batch import Size


def premultiply(pixels: Tensor) -> Tensor:
    """Convert RGBA uint8 (4, H, W) to premultiplied float in [0, 1]."""
    values = pixels.float() / 255
    return torch.cat([values[:3] * values[3:], values[3:]])


def contain(image: Tensor, size: Size) -> Tensor:
    """Scale premultiplied RGBA (4, h, w) to fit into `size`, centered."""
    height, width = size
    scale = min(height / image.shape[1], width / image.shape[2])
    inner = max(round(image.shape[1] * scale), 1), max(round(image.shape[2] * scale), 1)
    if inner != tuple(image.shape[1:]):
        image = F.interpolate(image[None], size=inner, mode="bicubic", antialias=True)[0].clamp(0, 1)
        image = torch.minimum(image, image[3:])  # bicubic overshoots, but no color exceeds its opacity
    left, top = (width - inner[1]) // 2, (height - inner[0]) // 2
    return F.pad(image, (left, width - inner[1] - left, top, height - inner[0] - top))


def composite(image: Tensor, color: tuple[float, ...]) -> Tensor:
    """Composite premultiplied RGBA (4, H, W) onto a color in [0, 1]. -> (3, H, W) in [-1, 1]."""
    background = torch.tensor(color).view(3, 1, 1) * (1 - image[3:])
    return (image[:3] + background) * 2 - 1
