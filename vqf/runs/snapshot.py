"""Everything of a run that a step changes: how it gets into a checkpoint, and back out of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps, on the CPU, in memory of its own: what goes on meanwhile does not change it."""

    state: Mapping[str, Any]
    config: DictConfig
    weights: Mapping[str, Mapping[str, Tensor]]
    optimizers: Mapping[str, Any]
