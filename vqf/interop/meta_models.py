"""Models on the meta device, without memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from vqf.batch import Size
from vqf.errors import UserError
from vqf.interop.infer_config import Node
from vqf.interop.key_mapping import KeyMapping, KeyRule, to_conv
from vqf.models.tokenizer import Tokenizer, build_tokenizer
from vqf.networks.weights import dtype_problem
from vqf.protocols import Prior
from vqf.registry import build
from vqf.tokens.prefix import PrefixSpec

Weights = dict[str, Tensor]
Nodes = dict[str, Any]  # config node of each component; None if there is none
MAX_LISTED = 3  # mismatches in one message


def meta_tokenizer(nodes: Nodes, size: Size, channels: int = 3) -> Tokenizer:
    """Build a tokenizer on the meta device."""
    with torch.device("meta"):
        return build_tokenizer(OmegaConf.create(dict(nodes)), size, channels)


def meta_discriminator(node: Node, channels: int = 3) -> nn.Module:
    """Build a discriminator on the meta device."""
    with torch.device("meta"):
        wired = {"in_channels": channels, "image_size": (256, 256)}
        return nn.ModuleDict({"discriminator": build("discriminator", node, **wired)})


def meta_prior(node: Node, tokenizer: Tokenizer, prefix: PrefixSpec) -> Prior:
    """Build a prior on the meta device."""
    with torch.device("meta"):
        return build("prior", node, layout=tokenizer.layout, prefix=prefix, quantizer=tokenizer.quantizer)


def convert_tensor(tensor: Tensor, rule: KeyRule | None = None) -> Tensor:
    """Reshape a tensor to vqf's shape, floats as float32."""
    tensor = tensor if rule is None else to_conv(tensor, rule)
    return tensor.float() if tensor.is_floating_point() else tensor


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Shape of each tensor by name."""
    return {name: each.shape for name, each in tensors.items()}


def check_shapes(path: Path, weights: Weights, blank: nn.Module, table: KeyMapping) -> None:
    """Compare imported weights with the model's.

    Raises:
        UserError: Naming the first tensors that are missing, unexpected, or of another shape or kind of number.
    """
    model = blank.state_dict()
    expected, actual = shapes_of(model), shapes_of(weights)
    mismatches = [f"{_source_name(table, name)} is missing" for name in expected if name not in actual]
    mismatches += [f"{_source_name(table, name)} is unexpected" for name in actual if name not in expected]
    mismatches += [
        f"{_source_name(table, name)} is {list(actual[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in actual and actual[name] != shape
    ]
    mismatches += [
        f"{_source_name(table, name)} {problem}"
        for name, tensor in weights.items()
        if name in model and (problem := dtype_problem(tensor, model[name]))
    ]
    if mismatches:
        more = f", and {len(mismatches) - MAX_LISTED} more" if len(mismatches) > MAX_LISTED else ""
        raise UserError(
            f"{path}: does not fit the model that its own sizes describe: {'; '.join(mismatches[:MAX_LISTED])}{more}"
        )


def _source_name(table: KeyMapping, name: str) -> str:
    translation = table.to_source(name)
    return f"'{translation[0] if translation else name}'"
