"""Small things that every pipeline does."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from vqf import ranks
from vqf.errors import UserError
from vqf.pipelines.cost import Meter
from vqf.pipelines.journal import Journal, Silence
from vqf.pipelines.source import commit
from vqf.protocols import Size, pair
from vqf.registry import build
from vqf.terminal import log

DEFAULT_IMAGE_SIZE = 256


def image_size(config: DictConfig) -> Size:
    """Read the image size of a config as height and width."""
    size = config.image_size
    return pair(OmegaConf.to_container(size) if OmegaConf.is_list(size) else size)  # type: ignore[arg-type]


def chosen(config: DictConfig, group: str) -> dict[str, DictConfig]:
    """Return the nodes of a group of which several are used at once; none where none is chosen."""
    return {str(name): node for name, node in (config.get(group) or {}).items() if node is not None}


@contextmanager
def start_run(config: DictConfig, run_dir: Path, meter: Meter | None = None, part: str = "") -> Iterator[Journal]:
    """Open the journal of a run, and close its loggers whatever happens.

    Args:
        config: Names the loggers.
        run_dir: Where they write.
        meter: Of what the run costs, if it began earlier than now.
        part: What this is of the run in the folder above, as "stage1" of pipeline=full; empty for a run of its own.

    Of several processes the first alone writes.
    """
    if not ranks.first():
        yield Silence()
        return
    nodes = chosen(config, "logger").values()
    journal = Journal(run_dir, [build("logger", node, run_dir=run_dir, config=config, part=part) for node in nodes])
    meter = meter or Meter()
    try:
        yield journal
    finally:
        try:
            _summarize(run_dir, meter)
        except OSError as error:  # a full disk takes no finished run down with it
            log.warning("summary.json cannot be written: %s", error.strerror)
        journal.close()


def _summarize(run_dir: Path, meter: Meter) -> None:
    """Write down what made the run, for its report."""
    versions = {name: version(name) for name in ("vqf", "torch", "hydra-core")}
    summary = {
        "command": command(),
        **meter.facts(),
        "versions": {**versions, "python": platform.python_version()},
        **commit(),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1))


def command() -> str:
    """Return the command line that this process belongs to."""
    return shlex.join([*_launcher(), "-m", "vqf.run", *sys.argv[1:]])


def _launcher() -> list[str]:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world()))
    machines = [f"--nnodes={ranks.world() // here}"] if ranks.world() > here else []
    return ["python"] if ranks.world() == 1 else ["torchrun", *machines, f"--nproc-per-node={here}"]


def save_numbers(run_dir: Path, tables: Mapping[str, Mapping[str, float]]) -> None:
    """Write `metrics.json`, the last look at held-out pictures, in the first process."""
    if ranks.first():
        (run_dir / "metrics.json").write_text(json.dumps(tables, indent=1))


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


def describe(what: str, module: nn.Module) -> str:
    """Say how large a model is."""
    return f"{what}: {sum(parameter.numel() for parameter in module.parameters()):,} parameters"
