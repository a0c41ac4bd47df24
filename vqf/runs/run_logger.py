"""Records a run in its folder: metrics.jsonl, details.json, summary.json and metrics.json."""

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
from vqf.protocols import Logger
from vqf.registry import build
from vqf.run_files.aside import make_way
from vqf.run_files.log_repair import truncate_log
from vqf.run_files.metrics_log import missing_steps
from vqf.run_files.records import take_record
from vqf.run_files.shapes import DETAILS
from vqf.runs.provenance import ResourceMeter, command_line, git_commit
from vqf.terminal import log


class RunLogger:
    """Appends scalars to `metrics.jsonl` and passes scalars and images to every logger.

    While the disk is full, lines of `metrics.jsonl` wait in memory; what a logger cannot write is lost.
    """

    def __init__(self, run_dir: Path, loggers: Sequence[Logger]) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        make_way(self.path)
        self.loggers = loggers
        self.start_time = time.time()
        self.pending_lines: list[str] = []  # not yet written to metrics.jsonl
        self.failing: set[str | int] = set()  # files and loggers whose last write failed; they are reported once

    def truncate_after(self, step: int, validated: bool = True, last_logged: int = 0) -> None:
        """Delete the lines after a step, and those of its validation unless `validated`.

        Args:
            last_logged: The step of the last line there should be; a warning says what is missing.
        """
        if message := missing_steps(self.path, truncate_log(self.path, (step, validated)), last_logged):
            log.warning("%s", message)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars of a step; NaN and infinity become strings."""
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
        if values:
            self._call_safely("details.json", partial(self._update_details, values))

    def sync(self) -> None:
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _append(self, line: str) -> None:
        self.pending_lines.append(line)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(f"{pending}\n" for pending in self.pending_lines))
        except OSError:
            if self.path.exists():
                os.truncate(self.path, size)  # the end of a line may be missing
            raise
        self.pending_lines = []

    def _update_details(self, values: Mapping[str, Any]) -> None:
        path = self.path.with_name("details.json")
        known = take_record(path, DETAILS)
        atomic_write_text(path, json.dumps({**known, **values}))

    def _call_safely(self, target: Logger | str, action: Callable[[], None]) -> None:
        key = target if isinstance(target, str) else id(target)
        try:
            action()
            self.failing.discard(key)
        except OSError as error:
            if key not in self.failing:
                name = target if isinstance(target, str) else type(target).__name__
                log.warning("%s cannot be written: %s; the run continues", name, error.strerror or error)
            self.failing.add(key)

    def close(self) -> None:
        for logger in self.loggers:
            self._call_safely(logger, logger.close)


class NullRunLogger(RunLogger):
    """The run logger of all processes but the main one."""

    def __init__(self) -> None:
        pass

    def truncate_after(self, step: int, validated: bool = True, last_logged: int = 0) -> None:
        """Do nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Do nothing."""

    def write_details(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@contextmanager
def start_run(
    config: DictConfig, run_dir: Path, meter: ResourceMeter | None = None, subrun: str = ""
) -> Iterator[RunLogger]:
    """Yield the logger of a run; at the end, even after an error, write `summary.json` and close the loggers.

    Args:
        subrun: "stage1" or "stage2" of pipeline=full.
    """
    if not comm.is_main():
        yield NullRunLogger()
        return
    nodes = group_nodes(config, "logger").values()
    loggers = [build("logger", node, run_dir=run_dir, config=config, subrun=subrun) for node in nodes]
    run_logger = RunLogger(run_dir, loggers)
    meter = meter or ResourceMeter()
    try:
        yield run_logger
    finally:
        try:
            _write_summary(run_dir, meter)
        except OSError as error:  # a full disk must not fail a finished run
            log.warning("summary.json cannot be written: %s", error.strerror)
        run_logger.close()


def save_metrics(run_dir: Path, tables: Mapping[str, Mapping[str, float]]) -> None:
    """Write `metrics.json` in the main process."""
    if comm.is_main():
        _write_record(run_dir / "metrics.json", tables)


def _write_summary(run_dir: Path, meter: ResourceMeter) -> None:
    versions = {name: version(name) for name in ("vqf", "torch", "hydra-core")}
    summary = {
        "command": command_line(),
        **meter.summary(),
        "versions": {**versions, "python": platform.python_version()},
        **git_commit(),
    }
    _write_record(run_dir / "summary.json", summary)


def _write_record(path: Path, content: Mapping[str, Any]) -> None:
    make_way(path)
    atomic_write_text(path, json.dumps(content, indent=1))
