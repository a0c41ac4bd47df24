"""metrics.jsonl, the record of a run that every other view of it is made from, and the fan-out to loggers."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from vqf.atomic import atomic_write_text
from vqf.config.access import group_nodes
from vqf.distributed import comm
from vqf.protocols import VALIDATION_PREFIX, Logger
from vqf.registry import build
from vqf.runs.provenance import ResourceMeter, command_line, git_commit
from vqf.terminal import log


class RunLogger:
    """Appends scalars to `metrics.jsonl` and hands them, and images, to every logger.

    A full disk ends no run here: lines wait in memory until there is room, a logger goes without what it cannot write.
    """

    def __init__(self, run_dir: Path, loggers: Sequence[Logger]) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        self.loggers = loggers
        self.start_time = time.time()
        self.pending_lines: list[str] = []  # lines that could not be written yet
        self.failing: set[str | int] = set()  # who could not write the last time

    def truncate_after(self, step: int, validated: bool = True) -> None:
        """Forget what an interrupted process wrote after the checkpoint that the run goes on from.

        Args:
            step: Of the checkpoint.
            validated: Whether it was written after the look at held-out images of its step.
        """
        if not self.path.is_file():
            return
        until = (step, validated)
        lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= until]
        atomic_write_text(self.path, "".join(f"{line}\n" for line in lines))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of a step."""
        finite = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time() - self.start_time, 3), **finite})
        self._call_safely("metrics.jsonl", partial(self._append, line))
        for logger in self.loggers:
            self._call_safely(logger, partial(logger.scalars, step, values))

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Record images (B, 3, H, W) of a step."""
        for logger in self.loggers:
            self._call_safely(logger, partial(logger.images, step, name, images))

    def write_details(self, values: Mapping[str, Any]) -> None:
        """Keep what was said of images and codes, in `details.json`: the newest of every name."""
        if values:
            self._call_safely("details.json", partial(self._update_details, values))

    def sync(self) -> None:
        """See to it that what was recorded so far outlives the machine."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _append(self, line: str) -> None:
        self.pending_lines.append(line)
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(f"{each}\n" for each in self.pending_lines))
        except OSError:
            if self.path.exists():
                os.truncate(self.path, before)  # half a line may be there
            raise
        self.pending_lines = []

    def _update_details(self, values: Mapping[str, Any]) -> None:
        path = self.path.with_name("details.json")
        known = json.loads(path.read_text()) if path.is_file() else {}
        atomic_write_text(path, json.dumps({**known, **values}))

    def _call_safely(self, target: Logger | str, action: Callable[[], None]) -> None:
        key = target if isinstance(target, str) else id(target)
        try:
            action()
            self.failing.discard(key)
        except OSError as error:
            if key not in self.failing:
                name = target if isinstance(target, str) else type(target).__name__
                log.warning("%s cannot be written: %s; the run goes on", name, error.strerror or error)
            self.failing.add(key)

    def close(self) -> None:
        """Let every logger finish."""
        for logger in self.loggers:
            self._call_safely(logger, logger.close)


class NullRunLogger(RunLogger):
    """The journal of every process but the first."""

    def __init__(self) -> None:
        pass

    def truncate_after(self, step: int, validated: bool = True) -> None:
        """Forget nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record nothing."""

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Record nothing."""

    def write_details(self, values: Mapping[str, Any]) -> None:
        """Keep nothing."""

    def sync(self) -> None:
        """Nothing was recorded."""

    def close(self) -> None:
        """Nothing is open."""


def _step_of(line: str) -> tuple[float, bool]:
    """Return the step of a line, and whether it is of a look at held-out images, which ends a step."""
    try:
        found = json.loads(line)
        return found["step"], any(key.startswith(VALIDATION_PREFIX) for key in found)
    except (ValueError, KeyError):  # a line that a killed process left half-written
        return math.inf, True


@contextmanager
def start_run(
    config: DictConfig, run_dir: Path, meter: ResourceMeter | None = None, subrun: str = ""
) -> Iterator[RunLogger]:
    """Open the journal of a run, and close its loggers whatever happens.

    Args:
        config: Names the loggers.
        run_dir: Where they write.
        meter: Of what the run costs, if it began earlier than now.
        subrun: What this is of the run in the folder above, as "stage1" of pipeline=full; empty for a run of its own.

    Of several processes the first alone writes.
    """
    if not comm.is_main():
        yield NullRunLogger()
        return
    nodes = group_nodes(config, "logger").values()
    loggers = [build("logger", node, run_dir=run_dir, config=config, subrun=subrun) for node in nodes]
    journal = RunLogger(run_dir, loggers)
    meter = meter or ResourceMeter()
    try:
        yield journal
    finally:
        try:
            _write_summary(run_dir, meter)
        except OSError as error:  # a full disk takes no finished run down with it
            log.warning("summary.json cannot be written: %s", error.strerror)
        journal.close()


def _write_summary(run_dir: Path, meter: ResourceMeter) -> None:
    """Write down what made the run, for its report."""
    versions = {name: version(name) for name in ("vqf", "torch", "hydra-core")}
    summary = {
        "command": command_line(),
        **meter.summary(),
        "versions": {**versions, "python": platform.python_version()},
        **git_commit(),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1))


def save_metrics(run_dir: Path, tables: Mapping[str, Mapping[str, float]]) -> None:
    """Write `metrics.json`, the last look at held-out images, in the first process."""
    if comm.is_main():
        (run_dir / "metrics.json").write_text(json.dumps(tables, indent=1))
