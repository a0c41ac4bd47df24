"""`Snapshot`: the content of one checkpoint in memory, handed from training to `async_checkpointer`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """The state of a run between two steps.

    Tensors are copies on the CPU, so that training can change its own while they are written.
    """

    state: Mapping[str, Any]
    config: DictConfig
    weights: Mapping[str, Mapping[str, Tensor]]
    optimizers: Mapping[str, Any]
