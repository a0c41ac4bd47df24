"""Models without memory: what names and shapes do weights have to have?"""

from collections.abc import Mapping
from dataclasses import dataclass
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
from vqf.protocols import Prior
from vqf.registry import build

Weights = dict[str, Tensor]
Nodes = dict[str, Any]  # a mapping for every part of a model; null for one that it lacks
MAX_LISTED = 3  # faults that an error names


def meta_tokenizer(nodes: Nodes, size: Size, channels: int = 3) -> Tokenizer:
    """Build a tokenizer on the meta device."""
    with torch.device("meta"):
        return build_tokenizer(OmegaConf.create(dict(nodes)), size, channels)


def meta_discriminator(node: Node, channels: int = 3) -> nn.Module:
    """Build a discriminator on the meta device, under the names of a run's checkpoint."""
    with torch.device("meta"):
        return nn.ModuleDict({"discriminator": build("discriminator", node, in_channels=channels)})


@dataclass(frozen=True)
class PrefixSpec:
    """What a prior has to know of its conditioner."""

    vocab_size: int
    length: int


def meta_prior(node: Node, vocab_size: int, grid: Size, prefix: PrefixSpec) -> Prior:
    """Build a prior on the meta device."""
    with torch.device("meta"):
        return build(
            "prior",
            node,
            vocab_size=vocab_size,
            length=grid[0] * grid[1],
            grid=grid,
            prefix_vocab=prefix.vocab_size,
            prefix_length=prefix.length,
        )


def convert_tensor(tensor: Tensor, rule: KeyRule | None = None) -> Tensor:
    """Bring a tensor into vqf's form and precision."""
    tensor = tensor if rule is None else to_conv(tensor, rule)
    return tensor.float() if tensor.is_floating_point() else tensor


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shapes of tensors."""
    return {name: each.shape for name, each in tensors.items()}


def check_shapes(path: Path, weights: Weights, blank: nn.Module, table: KeyMapping) -> None:
    """Compare what was read with what the model needs.

    Raises:
        UserError: Naming the first tensors that are missing, too many, or of another shape.
    """
    wanted, found = shapes_of(blank.state_dict()), shapes_of(weights)
    faults = [f"{_source_name(table, name)} is missing" for name in wanted if name not in found]
    faults += [f"{_source_name(table, name)} has no place" for name in found if name not in wanted]
    faults += [
        f"{_source_name(table, name)} is {list(found[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if faults:
        more = f", and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
        raise UserError(
            f"{path}: does not fit the model that its own sizes describe: {'; '.join(faults[:MAX_LISTED])}{more}"
        )


def _source_name(table: KeyMapping, name: str) -> str:
    found = table.to_source(name)
    return f"'{found[0] if found else name}'"
