"""What an evaluation found: numbers, and every fact that they depend on, in one file."""

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
from vqf.protocols import SetMetricResult
from vqf.runs.checkpoint import MANIFEST, Checkpoint
from vqf.runs.provenance import command_line, git_commit
from vqf.terminal import log

EVALUATIONS_FOLDER = "evaluations"
METRICS_FILE = "metrics.json"
PACKAGES = ("vqf", "torch", "torch-fidelity", "timm", "numpy")
PER_METRIC_FIELDS = ("values", "intervals", "floors", "settings", "higher_is_better")


@dataclass
class EvaluationResult:
    """Numbers by one protocol."""

    protocol: dict[str, Any] = field(default_factory=dict)  # its lines, then its hash
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %
    floors: dict[str, float] = field(default_factory=dict)  # the same metric of real images against real ones
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the metric that gave each number
    higher_is_better: dict[str, bool] = field(default_factory=dict)  # where the metric says so
    images: dict[str, Tensor] = field(default_factory=dict)  # images to show, (B, C, H, W)
    details: dict[str, Any] = field(default_factory=dict)  # what is said of them

    def add(self, metric: object, result: SetMetricResult, settings: dict[str, Any], prefix: str = "") -> None:
        """Add what a metric says; its numbers are called so with a prefix."""
        senses: Mapping[str, bool] = getattr(metric, "higher_is_better", {})
        usual = getattr(metric, "reconstruction_prefix", "")  # of the names that it has as a metric of a tokenizer
        self.values |= {f"{prefix}{key}": value for key, value in result.values.items()}
        self.intervals |= {f"{prefix}{key}": value for key, value in result.intervals.items()}
        self.settings |= {f"{prefix}{key}": settings | result.settings for key in result.values}
        for key in result.values:
            if (sense := senses.get(key, senses.get(f"{usual}{key}"))) is not None:
                self.higher_is_better[f"{prefix}{key}"] = sense

    def set_protocol(self, lines: dict[str, Any]) -> None:
        """Set the lines of the protocol, and their hash."""
        self.protocol = lines | {"hash": stable_hash(lines)}

    @property
    def folder_name(self) -> str:
        """The name of the folder of this protocol."""
        return f"{self.protocol['name']}-{self.protocol['hash'][:8]}"

    def print_table(self) -> None:
        """Print a table."""
        rows = [
            (key, f"{value:.4g}", _format_interval(self.intervals.get(key)), _format_number(self.floors.get(key)))
            for key, value in self.values.items()
        ]
        title = f"{self.protocol['name']}, {self.protocol['count']} images"
        terminal.print_table(title, ("metric", "value", "95 %", "real against real"), rows)


def checkpoint_info(checkpoint: Checkpoint) -> dict[str, Any]:
    """Say which checkpoint was measured."""
    facts = {"kind": checkpoint.kind, "step": checkpoint.step, "path": str(checkpoint.path)}
    return {**facts, "sha256": manifest_sha256(checkpoint)}


def manifest_sha256(checkpoint: Checkpoint) -> str:
    """Return what tells a checkpoint from every other: the hash of its manifest, which hashes every file of it."""
    return sha256_of_file(checkpoint.path / MANIFEST)


def environment(seconds: float, device: str) -> dict[str, Any]:
    """Say what else could matter."""
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
    """Write `metrics.json` below the run that was measured, and a copy in the folder of this one.

    Numbers of the same checkpoint by the same protocol that are there already are kept, each with the command that
    gave it.
    """
    content = {key: _json_safe(getattr(result, key)) for key in PER_METRIC_FIELDS}
    content["commands"] = [{"numbers": list(result.values), **environment_info}]
    path = run / EVALUATIONS_FOLDER / result.folder_name / f"{checkpoint.kind}-{checkpoint.step:08d}" / METRICS_FILE
    about, earlier = checkpoint_info(checkpoint), _read(path)
    if earlier.get("checkpoint", {}).get("sha256") == about["sha256"]:
        content = _merge(earlier, content)
    content = {"protocol": result.protocol, "checkpoint": about, **content}
    _write(run_dir / METRICS_FILE, content)
    try:
        check_symlinks(run)
        _write(path, content)
    except (OSError, UserError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        log.warning("%s cannot be written (%s); the numbers are in %s", path, why, run_dir / METRICS_FILE)
        return run_dir / METRICS_FILE
    return path


def _merge(earlier: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two measurements say; of a number that both have, nothing of the earlier one stays."""
    anew = new["values"].keys()
    both = {
        key: {name: each for name, each in earlier.get(key, {}).items() if name not in anew} | new[key]
        for key in PER_METRIC_FIELDS
    }
    commands = [
        {**each, "numbers": [name for name in each["numbers"] if name not in anew]} for each in earlier["commands"]
    ]
    return {**both, "commands": [*(each for each in commands if each["numbers"]), *new["commands"]]}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    atomic_write_text(path, json.dumps(content, indent=1, allow_nan=False))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _json_safe(value: Any) -> Any:
    """Turn numbers that JSON has no words for into null."""
    if isinstance(value, Mapping):
        return {key: _json_safe(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_json_safe(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _format_interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
