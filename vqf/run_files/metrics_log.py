"""`metrics.jsonl` line by line: memory does not grow with its length."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vqf.run_files.aside import not_a_file, warn_once
from vqf.run_files.shapes import is_count, is_finite, is_number

MAX_LINE_BYTES = 2**20  # a longer line is damaged
MAX_NAMED = 8  # lines in one message


@dataclass(frozen=True)
class LogLine:
    """A line, or a part of `MAX_LINE_BYTES` of it."""

    number: int  # from 1
    raw: bytes  # with the line end, unless it was written by half
    values: dict[str, Any] | None  # None if it is damaged


@dataclass
class DamagedLines:
    """Counts damaged lines; keeps the numbers of the first."""

    count: int = 0
    last: int = 0  # number of the last
    numbers: list[int] = field(default_factory=list)

    def add(self, number: int) -> None:
        if number != self.last:  # else another part of the same line
            self.count, self.last = self.count + 1, number
            self.numbers = [*self.numbers, number][:MAX_NAMED]

    def __str__(self) -> str:
        numbers = ", ".join(map(str, sorted(self.numbers)))
        more = f" and {self.count - len(self.numbers)} more" if self.count > len(self.numbers) else ""
        return f"line {numbers} is damaged" if self.count == 1 else f"lines {numbers}{more} are damaged"


def read_lines(path: Path) -> Iterator[LogLine]:
    """Yield the lines, without half a line at the end, which a running or killed process leaves.

    Raises:
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        number = 1
        for raw in iter(partial(file.readline, MAX_LINE_BYTES), b""):
            values = parse_line(raw)
            if values is not None or raw.endswith(b"\n") or len(raw) == MAX_LINE_BYTES:
                yield LogLine(number, raw, values)
            number += raw.endswith(b"\n")


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """Read the scalars of a step; None if it is not a line that `RunLogger` writes."""
    try:
        values = json.loads(raw.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not is_count(values.get("step")) or not is_finite(values.get("time", 0)):
        return None
    return values if all(is_number(value) or isinstance(value, str) for value in values.values()) else None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the values of every line; damaged lines are left out, and named at the end."""
    if not path.is_file():
        if os.path.lexists(path):
            warn_once(f"{path}: {not_a_file(path)}; left out")
        return
    damaged = DamagedLines()
    for line in read_lines(path):
        if line.values is None:
            damaged.add(line.number)
        else:
            yield line.values
    if damaged.count:
        warn_once(f"{path}: {damaged}; left out")


class LogTotals:
    """Adds up over lines what their readers need: running times and the last step."""

    def __init__(self) -> None:
        self.last_step = 0
        self.processes = 1  # a falling `time` starts another
        self._finished_seconds = 0.0  # of processes but the last
        self._last_time = 0.0

    @property
    def seconds(self) -> float:
        """The running time of all processes."""
        return self._finished_seconds + self._last_time

    def follow(self, lines: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Yield the lines and add them."""
        for line in lines:
            now = line.get("time", self._last_time)
            if now < self._last_time:
                self._finished_seconds += self._last_time
                self.processes += 1
            self._last_time, self.last_step = now, line["step"]
            yield line


def missing_steps(path: Path, last_step: int, last_logged: int) -> str:
    """Message for a log that was cut; "" if it was not.

    Args:
        last_step: Of its last line.
        last_logged: The last step that the newest checkpoint knows to be logged.
    """
    if last_step >= last_logged:
        return ""
    return f"{path}: has no line after step {last_step}, but the run logged until step {last_logged}; curves lack these"
