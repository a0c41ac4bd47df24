"""Readers of a run's files, any of which may be missing, cut short, or made by someone else."""

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

MAX_YAML_CHARACTERS, MAX_YAML_VALUES, MAX_YAML_DEPTH = 2_000_000, 100_000, 100


def read_text(path: Path) -> str:
    """Read a text file; "" if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if it is missing or invalid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_yaml(path: Path) -> DictConfig | ListConfig:
    """Read a YAML or JSON file as a config, unresolved.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no YAML, or has more values or levels than any config, its aliases expanded.
    """
    text = path.read_text(encoding="utf-8")
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"{len(text):,} characters, and no config has more than {MAX_YAML_CHARACTERS:,}")
    try:
        _check_expanded_size(text)
        return OmegaConf.load(io.StringIO(text))
    except Exception as error:  # yaml and omegaconf raise their own, Python others for what a text may name
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from error


def _check_expanded_size(text: str) -> None:
    """Count values with every alias (`*name`) expanded: each level of `[*a, *a]` doubles them."""
    size_of_anchor: dict[str | None, int] = {}
    open_collections: list[tuple[str | None, int]] = []  # the anchor of each, and the count where it began
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, start = open_collections.pop()
            size_of_anchor[anchor] = count - start
        elif isinstance(event, yaml.AliasEvent):
            count += size_of_anchor.get(event.anchor, 0)
        count += isinstance(event, yaml.NodeEvent)
        if count > MAX_YAML_VALUES or len(open_collections) > MAX_YAML_DEPTH:
            raise ValueError(f"more than {MAX_YAML_VALUES:,} values, its aliases expanded, or {MAX_YAML_DEPTH} levels")


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a `metrics.jsonl` that have a step."""
    for line in read_text(path).splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a process that was killed
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
