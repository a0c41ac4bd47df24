"""Functions of quantizers that are made of others."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqf.errors import UserError
from vqf.protocols import Layered, Quantized, Quantizer, Updates
from vqf.registry import RegistryError, build, check_options

WHERE = "model.quantizer"


def build_base(node: Mapping[str, Any], count: int) -> nn.ModuleList:
    """Build `count` quantizers of the node `base`.

    Raises:
        RegistryError: If the node is wrong, or its tokens have several scales.
    """
    where = f"{WHERE}.base"
    if node.get("name") is None:
        raise RegistryError(f"{where}: no quantizer is chosen; choose one as in '{where}={{name:vq}}'")
    check_options("quantizer", node, where)
    try:
        quantizers = nn.ModuleList(build("quantizer", node) for _ in range(count))
        codebook_sizes(quantizers[0])
    except UserError as error:  # of a base within the base
        raise type(error)(re.sub(rf"\b{re.escape(WHERE)}\.", f"{where}.", str(error))) from error
    except ValueError as error:
        raise RegistryError(
            f"{where}.name={node['name']}: its tokens have several scales, which cannot be a part of another "
            f"quantizer; take one of a single grid, as in '{where}={{name:vq}}'"
        ) from error
    return quantizers


def codebook_sizes(quantizer: Any) -> tuple[int, ...]:
    """Number of codes of each codebook of a quantizer of a single grid, whatever its size.

    Raises:
        ValueError: If its tokens have several scales.
    """
    if not isinstance(quantizer, Layered):
        return (quantizer.vocab_size,)
    layout = quantizer.layout((1, 1), None)
    if len(layout.scales) > 1:
        raise ValueError("several scales")
    return layout.vocab_sizes


def join_indices(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate indices (B, h, w) or (B, h, w, K) to those of all codebooks; (B, h, w) if there is one."""
    indices = torch.cat([part if part.ndim == 4 else part[..., None] for part in parts], dim=-1)
    return indices if indices.shape[-1] > 1 else indices[..., 0]


def split_indices(indices: Tensor, counts: Iterable[int]) -> Iterator[Tensor]:
    """Split indices of all codebooks, or of the first ones, into those of quantizers with so many codebooks each."""
    indices = indices if indices.ndim == 4 else indices[..., None]
    start = 0
    for count in counts:
        part = indices[..., start : start + count]
        start += count
        if part.shape[-1]:
            yield part if count > 1 else part[..., 0]


def merge_stats(parts: Sequence[Quantized]) -> dict[str, Tensor]:
    """The mean of each of the log's scalars, of `perplexity` the geometric one; with several also each."""
    if len(parts) == 1:
        return dict(parts[0].stats)
    columns = {key: torch.stack([part.stats[key].detach().float() for part in parts]) for key in parts[0].stats}
    means = {key: each.log().mean().exp() if key == "perplexity" else each.mean() for key, each in columns.items()}
    return means | {f"{key}/{k}": value for key, each in columns.items() for k, value in enumerate(each)}


def update_all(quantizers: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Advance the state of those that have one. Returns the sum of each of their scalars, with several also each."""
    logs = [quantizer.update() if isinstance(quantizer, Updates) else {} for quantizer in quantizers]
    if len(logs) == 1:
        return logs[0]
    each = {f"{key}/{k}": value for k, log in enumerate(logs) for key, value in log.items()}
    keys = dict.fromkeys(key for log in logs for key in log)  # a level that was not trained has none
    return {key: torch.stack([log[key] for log in logs if key in log]).sum() for key in keys} | each


def base_of(quantizers: nn.ModuleList) -> Quantizer:
    """The first of equal quantizers."""
    first: Any = quantizers[0]
    return first
