"""Small things that every pipeline does."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from vqf.pipelines.journal import Journal
from vqf.protocols import Size, pair
from vqf.registry import build

DEFAULT_IMAGE_SIZE = 256


def image_size(config: DictConfig) -> Size:
    """Read the image size of a config as height and width."""
    size = config.image_size
    return pair(OmegaConf.to_container(size) if OmegaConf.is_list(size) else size)  # type: ignore[arg-type]


@contextmanager
def start_run(config: DictConfig, run_dir: Path) -> Iterator[Journal]:
    """Open the journal of a run, and close its loggers whatever happens."""
    nodes = (config.logger or {}).values()
    journal = Journal(run_dir, [build("logger", node, run_dir=run_dir, config=config) for node in nodes if node])
    try:
        yield journal
    finally:
        journal.close()


class Accumulated:
    """Sums what is logged over micro-batches, on the device: reading a number would wait for it."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Add values, of which this micro-batch is a share."""
        for key, value in values.items():
            self.values[key] = self.values.get(key, 0) + value.detach() * share


def step_optimizer(optimizer: Optimizer, clip: float | None) -> Tensor:
    """Clip the gradients if asked to, take one step, forget the gradients; returns their norm before clipping."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def describe(what: str, module: nn.Module) -> str:
    """Say how large a model is."""
    return f"{what}: {sum(parameter.numel() for parameter in module.parameters()):,} parameters"
