"""metrics.jsonl, the record of a run that every other view of it is made from, and the fan-out to loggers."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vqf.pipelines.atomic import write_text
from vqf.protocols import Logger
from vqf.terminal import log

HELD_OUT = "validation/"  # in front of the names of numbers


class Journal:
    """Appends scalars to `metrics.jsonl` and hands them, and pictures, to every logger.

    A full disk ends no run here: lines wait in memory until there is room, a logger goes without what it cannot write.
    """

    def __init__(self, run_dir: Path, loggers: Sequence[Logger]) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        self.loggers = loggers
        self.began = time.time()
        self.waiting: list[str] = []  # lines that could not be written yet
        self.failed: set[str | int] = set()  # who could not write the last time

    def rewind(self, step: int, looked: bool = True) -> None:
        """Forget what an interrupted process wrote after the checkpoint that the run goes on from.

        Args:
            step: Of the checkpoint.
            looked: Whether it was written after the look at held-out pictures of its step.
        """
        if not self.path.is_file():
            return
        until = (step, looked)
        lines = [line for line in self.path.read_text().splitlines() if _place(line) <= until]
        write_text(self.path, "".join(f"{line}\n" for line in lines))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of a step."""
        finite = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time() - self.began, 3), **finite})
        self._tell("metrics.jsonl", partial(self._append, line))
        for logger in self.loggers:
            self._tell(logger, partial(logger.scalars, step, values))

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Record pictures (B, 3, H, W) of a step."""
        for logger in self.loggers:
            self._tell(logger, partial(logger.images, step, name, images))

    def details(self, values: Mapping[str, Any]) -> None:
        """Keep what was said of pictures and codes, in `details.json`: the newest of every name."""
        if values:
            self._tell("details.json", partial(self._keep, values))

    def sync(self) -> None:
        """See to it that what was recorded so far outlives the machine."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _append(self, line: str) -> None:
        self.waiting.append(line)
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(f"{each}\n" for each in self.waiting))
        except OSError:
            if self.path.exists():
                os.truncate(self.path, before)  # half a line may be there
            raise
        self.waiting = []

    def _keep(self, values: Mapping[str, Any]) -> None:
        path = self.path.with_name("details.json")
        known = json.loads(path.read_text()) if path.is_file() else {}
        write_text(path, json.dumps({**known, **values}))

    def _tell(self, whom: Logger | str, action: Callable[[], None]) -> None:
        key = whom if isinstance(whom, str) else id(whom)
        try:
            action()
            self.failed.discard(key)
        except OSError as error:
            if key not in self.failed:
                name = whom if isinstance(whom, str) else type(whom).__name__
                log.warning("%s cannot be written: %s; the run goes on", name, error.strerror or error)
            self.failed.add(key)

    def close(self) -> None:
        """Let every logger finish."""
        for logger in self.loggers:
            self._tell(logger, logger.close)


class Silence(Journal):
    """The journal of every process but the first."""

    def __init__(self) -> None:
        pass

    def rewind(self, step: int, looked: bool = True) -> None:
        """Forget nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record nothing."""

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Record nothing."""

    def details(self, values: Mapping[str, Any]) -> None:
        """Keep nothing."""

    def sync(self) -> None:
        """Nothing was recorded."""

    def close(self) -> None:
        """Nothing is open."""


def _place(line: str) -> tuple[float, bool]:
    """Return the step of a line, and whether it is of a look at held-out pictures, which ends a step."""
    try:
        found = json.loads(line)
        return found["step"], any(key.startswith(HELD_OUT) for key in found)
    except (ValueError, KeyError):  # a line that a killed process left half-written
        return math.inf, True
