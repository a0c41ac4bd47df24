"""Small things that every pipeline does."""

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from vqf.errors import UserError
from vqf.pipelines.journal import Journal
from vqf.protocols import Size, pair
from vqf.registry import build

DEFAULT_IMAGE_SIZE = 256


def image_size(config: DictConfig) -> Size:
    """Read the image size of a config as height and width."""
    size = config.image_size
    return pair(OmegaConf.to_container(size) if OmegaConf.is_list(size) else size)  # type: ignore[arg-type]


def chosen(config: DictConfig, group: str) -> dict[str, DictConfig]:
    """Return the nodes of a group of which several are used at once; none where none is chosen."""
    return {str(name): node for name, node in (config.get(group) or {}).items() if node is not None}


@contextmanager
def start_run(config: DictConfig, run_dir: Path, began: float | None = None) -> Iterator[Journal]:
    """Open the journal of a run, and close its loggers whatever happens.

    Args:
        config: Names the loggers.
        run_dir: Where they write.
        began: When the run began by `time.monotonic`, if earlier than now.
    """
    nodes = chosen(config, "logger").values()
    journal = Journal(run_dir, [build("logger", node, run_dir=run_dir, config=config) for node in nodes])
    began = time.monotonic() if began is None else began
    try:
        yield journal
    finally:
        _summarize(run_dir, time.monotonic() - began)
        journal.close()


def _summarize(run_dir: Path, seconds: float) -> None:
    """Write down what made the run, for its report."""
    versions = {name: version(name) for name in ("vqf", "torch", "hydra-core")}
    summary = {
        "command": shlex.join(["python", "-m", "vqf.run", *sys.argv[1:]]),
        "wall_seconds": round(seconds, 1),
        "versions": {**versions, "python": platform.python_version()},
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1))


class Accumulated:
    """Sums what is logged over micro-batches, on the device: reading a number would wait for it."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Add values, of which this micro-batch is a share."""
        for key, value in values.items():
            self.values[key] = self.values.get(key, 0) + value.detach() * share


def check_accumulate(config: DictConfig) -> None:
    """Refuse micro-batches that are not equal."""
    if config.batch_size % config.accumulate:
        raise UserError(f"accumulate={config.accumulate} must divide batch_size={config.batch_size}")


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
