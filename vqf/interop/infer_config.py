"""Reads config nodes from the shapes of tensors."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Size

from vqf.errors import UserError

Shapes = Mapping[str, Size]  # by vqf's names
Node = dict[str, Any]


def encoder_node(shapes: Shapes, image_size: int) -> Node:
    """Config node of an encoder for images of side `image_size`."""
    channels = _shape(shapes, "encoder.conv_in.weight")[0]
    return {
        "name": "conv",
        "dim": _shape(shapes, "encoder.conv_out.weight")[0],
        **_levels(shapes, "encoder.down", channels, image_size),
        "middle_attention": "encoder.mid.2.norm1.weight" in shapes,
    }


def decoder_node(shapes: Shapes, image_size: int) -> Node:
    """Config node of a decoder."""
    channels = _shape(shapes, "encoder.conv_in.weight")[0]
    node = _levels(shapes, "decoder.up", channels, image_size)
    return {
        "name": "conv",
        **node,
        "blocks": node["blocks"] - 1,  # the decoder has one more block a level than the encoder
        "middle_attention": "decoder.mid.2.norm1.weight" in shapes,
    }


def image_channels(shapes: Shapes) -> int:
    """Channels of a tokenizer's images."""
    return _shape(shapes, "encoder.conv_in.weight")[1]


def quantizer_node(shapes: Shapes, name: str) -> Node:
    """Config node of a quantizer."""
    codebook = shapes.get("quantizer.codebook.weight") or _shape(shapes, "quantizer.codebook")
    return {"name": name, "dim": codebook[1], "codebook_size": codebook[0]}


def discriminator_node(shapes: Shapes) -> Node | None:
    """Config node of a PatchGAN with batch norm, else None."""
    indices = [int(match[1]) for name in shapes if (match := re.fullmatch(r"discriminator\.main\.(\d+)\.weight", name))]
    if not indices or "discriminator.main.3.running_mean" not in shapes:
        return None
    channels = shapes["discriminator.main.0.weight"][0]
    return {"name": "patchgan", "channels": channels, "layers": (max(indices) - 2) // 3, "norm": "batch"}


def prior_node(shapes: Shapes, heads: int) -> Node:
    """Config node of a GPT."""
    return {
        "name": "gpt",
        "layers": count_blocks(shapes, "blocks"),
        "heads": heads,
        "dim": _shape(shapes, "token_embedding.weight")[1],
    }


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Number of distinct i in names that begin with `{prefix}.{i}.`."""
    return len({match[1] for name in names if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))})


def _levels(shapes: Shapes, prefix: str, channels: int, image_size: int) -> Node:
    levels = range(count_blocks(shapes, prefix))
    widths = [_shape(shapes, f"{prefix}.{i}.block.0.conv1.weight")[0] for i in levels]
    if any(width % channels for width in widths):
        raise UserError(f"widths {widths} of {prefix} are not multiples of the first, {channels}: not supported")
    return {
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": count_blocks(shapes, f"{prefix}.0.block"),
        # The config names attention levels by their resolution, for an image of the training size.
        "attention": [image_size // 2**i for i in levels if f"{prefix}.{i}.attn.0.norm.weight" in shapes],
    }


def _shape(shapes: Shapes, name: str) -> Size:
    if name not in shapes:
        raise UserError(f"'{name}' (vqf's name) is missing")
    return shapes[name]
