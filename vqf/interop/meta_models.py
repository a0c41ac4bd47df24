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
from vqf.interop.key_mapping import Rule, Table, inflate
from vqf.models.tokenizer import Tokenizer, build_tokenizer
from vqf.protocols import Prior
from vqf.registry import build

Weights = dict[str, Tensor]
Nodes = dict[str, Any]  # a mapping for every part of a model; null for one that it lacks
NAMED = 3  # faults that an error names


def blank_tokenizer(nodes: Nodes, size: Size, channels: int = 3) -> Tokenizer:
    """Build a tokenizer on the meta device."""
    with torch.device("meta"):
        return build_tokenizer(OmegaConf.create(dict(nodes)), size, channels)


def blank_discriminator(node: Node, channels: int = 3) -> nn.Module:
    """Build a discriminator on the meta device, under the names of a run's checkpoint."""
    with torch.device("meta"):
        return nn.ModuleDict({"discriminator": build("discriminator", node, in_channels=channels)})


@dataclass(frozen=True)
class Prefix:
    """What a prior has to know of its conditioner."""

    vocab_size: int
    length: int


def blank_prior(node: Node, vocab_size: int, grid: Size, prefix: Prefix) -> Prior:
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


def take(tensor: Tensor, rule: Rule | None = None) -> Tensor:
    """Bring a tensor into vqf's form and precision."""
    tensor = tensor if rule is None else inflate(tensor, rule)
    return tensor.float() if tensor.is_floating_point() else tensor


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shapes of tensors."""
    return {name: each.shape for name, each in tensors.items()}


def check_shapes(path: Path, weights: Weights, blank: nn.Module, table: Table) -> None:
    """Compare what was read with what the model needs.

    Raises:
        UserError: Naming the first tensors that are missing, too many, or of another shape.
    """
    wanted, found = shapes(blank.state_dict()), shapes(weights)
    faults = [f"{_theirs(table, name)} is missing" for name in wanted if name not in found]
    faults += [f"{_theirs(table, name)} has no place" for name in found if name not in wanted]
    faults += [
        f"{_theirs(table, name)} is {list(found[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if faults:
        more = f", and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise UserError(
            f"{path}: does not fit the model that its own sizes describe: {'; '.join(faults[:NAMED])}{more}"
        )


def _theirs(table: Table, name: str) -> str:
    found = table.theirs(name)
    return f"'{found[0] if found else name}'"
