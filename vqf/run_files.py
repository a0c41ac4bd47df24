"""Readers of a run's files, any of which may be missing or cut short."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """Read a text file; "" if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if it is missing or invalid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a `metrics.jsonl` that have a step."""
    for line in read_text(path).splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # the last line of a process that was killed
            continue
        if isinstance(values, dict) and is_number(values.get("step")):
            yield values


def evaluation_files(folder: Path) -> list[Path]:
    """List the files of pipeline=evaluate below a run."""
    return sorted(folder.glob("evaluations/*/*/metrics.json"))


def log_times(lines: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return every `time` of a `metrics.jsonl`: seconds since the process started."""
    return [line["time"] for line in lines if is_number(line.get("time"))]


def elapsed_seconds(times: Sequence[float]) -> float:
    """Add up the running times of processes; a falling time starts a new one."""
    return sum(now for now, after in pairwise([*times, -1.0]) if after < now)


def is_number(value: Any) -> bool:
    """Tell whether a JSON value is a number, nan included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Tell whether a JSON value is a finite number."""
    return is_number(value) and math.isfinite(value)
