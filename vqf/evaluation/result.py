"""The result of an evaluation, and its file."""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from vqf import terminal
from vqf.atomic import atomic_write_text
from vqf.config.untrusted import check_symlinks
from vqf.errors import UserError
from vqf.evaluation.protocols import stable_hash
from vqf.hashing import sha256_of_file
from vqf.protocols import Directed, SetMetric, SetMetricResult
from vqf.run_files.aside import make_way
from vqf.run_files.records import take_record
from vqf.run_files.shapes import METRICS
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.checkpoint_files import MANIFEST
from vqf.runs.provenance import command_line, git_commit
from vqf.terminal import format_number, log

EVALUATIONS_FOLDER = "evaluations"
METRICS_FILE = "metrics.json"
PACKAGES = ("vqf", "torch", "torch-fidelity", "timm", "numpy")
PER_METRIC_FIELDS = ("values", "intervals", "floors", "settings", "higher_is_better")


@dataclass
class EvaluationResult:
    """Metrics of one checkpoint by one protocol."""

    protocol: dict[str, Any] = field(default_factory=dict)  # lines, and their hash
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 % confidence intervals
    floors: dict[str, float] = field(default_factory=dict)  # the metric of real images against real images
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the metric that computed each value
    higher_is_better: dict[str, bool] = field(default_factory=dict)  # of metrics that declare it
    images: dict[str, Tensor] = field(default_factory=dict)  # for the report, (B, C, H, W)
    details: dict[str, Any] = field(default_factory=dict)  # JSON by name of images

    def add(self, metric: object, result: SetMetricResult, settings: dict[str, Any], prefix: str = "") -> None:
        """Add a metric; keys get the prefix, such as "r" in rfid."""
        directions = metric.higher_is_better if isinstance(metric, Directed) else {}
        # The keys of a set metric are declared for reconstructions.
        declared_prefix = metric.reconstruction_prefix if isinstance(metric, SetMetric) else ""
        self.values |= {f"{prefix}{key}": value for key, value in result.values.items()}
        self.intervals |= {f"{prefix}{key}": value for key, value in result.intervals.items()}
        self.settings |= {f"{prefix}{key}": settings | result.settings for key in result.values}
        for key in result.values:
            if (higher := directions.get(key, directions.get(f"{declared_prefix}{key}"))) is not None:
                self.higher_is_better[f"{prefix}{key}"] = higher

    def set_protocol(self, lines: dict[str, Any]) -> None:
        self.protocol = lines | {"hash": stable_hash(lines)}

    @property
    def folder_name(self) -> str:
        return f"{self.protocol['name']}-{self.protocol['hash'][:8]}"

    def print_table(self) -> None:
        rows = [
            (key, format_number(value), _format_interval(self.intervals.get(key)), _format_floor(self.floors.get(key)))
            for key, value in self.values.items()
        ]
        title = f"{self.protocol['name']}, {self.protocol['count']} images"
        terminal.print_table(title, ("metric", "value", "95 %", "real against real"), rows)


def checkpoint_info(checkpoint: Checkpoint) -> dict[str, Any]:
    """Identify a checkpoint."""
    sha256 = manifest_sha256(checkpoint)
    return {"kind": checkpoint.kind, "step": checkpoint.step, "path": str(checkpoint.path), "sha256": sha256}


def manifest_sha256(checkpoint: Checkpoint) -> str:
    """Hash a checkpoint's manifest."""
    return sha256_of_file(checkpoint.path / MANIFEST)


def environment(seconds: float, device: str) -> dict[str, Any]:
    """Return command, versions, device and time."""
    return {
        "command": command_line(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": device,
        "seconds": round(seconds, 1),
        **git_commit(),
    }


def save(
    result: EvaluationResult, checkpoint: Checkpoint, environment_info: dict[str, Any], run: Path, run_dir: Path
) -> Path:
    """Write `metrics.json` below the evaluated `run`, and a copy in the evaluation's `run_dir`.

    Metrics of earlier evaluations of the same checkpoint by the same protocol are kept.

    Returns:
        The path below the run, or that of the copy if the run is not writable.
    """
    content = {key: _json_safe(getattr(result, key)) for key in PER_METRIC_FIELDS}
    content["commands"] = [{"metrics": list(result.values), **environment_info}]
    path = run / EVALUATIONS_FOLDER / result.folder_name / f"{checkpoint.kind}-{checkpoint.step:08d}" / METRICS_FILE
    info, earlier, refusal = checkpoint_info(checkpoint), dict[str, Any](), None
    try:
        check_symlinks(run)
        earlier = take_record(path, METRICS)
    except (OSError, UserError) as error:
        refusal = error
    if earlier.get("checkpoint", {}).get("sha256") == info["sha256"]:
        content = _merge(earlier, content)
    content = {"protocol": result.protocol, "checkpoint": info, **content}
    _write(run_dir / METRICS_FILE, content)
    try:
        if refusal:
            raise refusal
        _write(path, content)
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        log.warning("cannot write %s (%s); the metrics are in %s", path, reason, run_dir / METRICS_FILE)
        return run_dir / METRICS_FILE
    return path


def _merge(earlier: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    replaced = new["values"].keys()
    fields = {
        key: {name: value for name, value in earlier.get(key, {}).items() if name not in replaced} | new[key]
        for key in PER_METRIC_FIELDS
    }
    commands = [
        {**command, "metrics": [name for name in command.get("metrics", []) if name not in replaced]}
        for command in earlier.get("commands", [])
    ]
    return {**fields, "commands": [*(command for command in commands if command["metrics"]), *new["commands"]]}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    make_way(path)
    atomic_write_text(path, json.dumps(content, indent=1, allow_nan=False))


def _json_safe(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _format_interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{format_number(interval[0])} to {format_number(interval[1])}"


def _format_floor(value: float | None) -> str:
    return "" if value is None else format_number(value)
