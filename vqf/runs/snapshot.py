"""`Snapshot`: the content of one checkpoint in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """The state of a run between two steps; tensors are copies on the CPU."""

    state: Mapping[str, Any]
    config: DictConfig
    weights: Mapping[str, Mapping[str, Tensor]]
    optimizers: Mapping[str, Any]
