"""What an evaluation found: numbers, and every fact that they depend on, in one file."""

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from vqf import terminal
from vqf.config.untrusted import check_links
from vqf.errors import UserError
from vqf.evaluation.protocols import digest
from vqf.networks.weights import sha256
from vqf.protocols import Comparison
from vqf.runs.checkpoint import MANIFEST, Checkpoint
from vqf.runs.provenance import command, commit
from vqf.terminal import log

FOLDER = "evaluations"
FILE = "metrics.json"
PACKAGES = ("vqf", "torch", "torch-fidelity", "timm", "numpy")
BY_NUMBER = ("values", "intervals", "floors", "settings", "higher_is_better")


@dataclass
class Measurement:
    """Numbers by one protocol."""

    protocol: dict[str, Any] = field(default_factory=dict)  # its lines, then its hash
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %
    floors: dict[str, float] = field(default_factory=dict)  # the same metric of real pictures against real ones
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the metric that gave each number
    higher_is_better: dict[str, bool] = field(default_factory=dict)  # where the metric says so
    grids: dict[str, Tensor] = field(default_factory=dict)  # pictures to show, (B, C, H, W)
    details: dict[str, Any] = field(default_factory=dict)  # what is said of them

    def add(self, metric: object, found: Comparison, settings: dict[str, Any], prefix: str = "") -> None:
        """Add what a metric says; its numbers are called so with a prefix."""
        senses: Mapping[str, bool] = getattr(metric, "higher_is_better", {})
        usual = getattr(metric, "prefix", "")  # of the names that it has as a metric of a tokenizer
        self.values |= {f"{prefix}{key}": value for key, value in found.values.items()}
        self.intervals |= {f"{prefix}{key}": value for key, value in found.intervals.items()}
        self.settings |= {f"{prefix}{key}": settings | found.settings for key in found.values}
        for key in found.values:
            if (sense := senses.get(key, senses.get(f"{usual}{key}"))) is not None:
                self.higher_is_better[f"{prefix}{key}"] = sense

    def state(self, facts: dict[str, Any]) -> None:
        """Set the lines of the protocol, and their hash."""
        self.protocol = facts | {"hash": digest(facts)}

    @property
    def folder(self) -> str:
        """The name of the folder of this protocol."""
        return f"{self.protocol['name']}-{self.protocol['hash'][:8]}"

    def tell(self) -> None:
        """Print a table."""
        rows = [
            (key, f"{value:.4g}", _span(self.intervals.get(key)), _number(self.floors.get(key)))
            for key, value in self.values.items()
        ]
        title = f"{self.protocol['name']}, {self.protocol['count']} pictures"
        terminal.table(title, ("metric", "value", "95 %", "real against real"), rows)


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """Say which checkpoint was measured."""
    facts = {"kind": checkpoint.kind, "step": checkpoint.step, "path": str(checkpoint.path)}
    return {**facts, "sha256": mark(checkpoint)}


def mark(checkpoint: Checkpoint) -> str:
    """Return what tells a checkpoint from every other: the hash of its manifest, which hashes every file of it."""
    return sha256(checkpoint.path / MANIFEST)


def circumstances(seconds: float, device: str) -> dict[str, Any]:
    """Say what else could matter."""
    return {
        "command": command(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": device,
        "seconds": round(seconds, 1),
        **commit(),
    }


def save(found: Measurement, checkpoint: Checkpoint, facts: dict[str, Any], run: Path, run_dir: Path) -> Path:
    """Write `metrics.json` below the run that was measured, and a copy in the folder of this one.

    Numbers of the same checkpoint by the same protocol that are there already are kept, each with the command that
    gave it.
    """
    content = {key: _plain(getattr(found, key)) for key in BY_NUMBER}
    content["commands"] = [{"numbers": list(found.values), **facts}]
    path = run / FOLDER / found.folder / f"{checkpoint.kind}-{checkpoint.step:08d}" / FILE
    about, earlier = origin(checkpoint), _read(path)
    if earlier.get("checkpoint", {}).get("sha256") == about["sha256"]:
        content = _joined(earlier, content)
    content = {"protocol": found.protocol, "checkpoint": about, **content}
    _write(run_dir / FILE, content)
    try:
        check_links(run)
        _write(path, content)
    except (OSError, UserError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        log.warning("%s cannot be written (%s); the numbers are in %s", path, why, run_dir / FILE)
        return run_dir / FILE
    return path


def _joined(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two measurements say; of a number that both have, nothing of the earlier one stays."""
    anew = now["values"].keys()
    both = {
        key: {name: each for name, each in earlier.get(key, {}).items() if name not in anew} | now[key]
        for key in BY_NUMBER
    }
    commands = [
        {**each, "numbers": [name for name in each["numbers"] if name not in anew]} for each in earlier["commands"]
    ]
    return {**both, "commands": [*(each for each in commands if each["numbers"]), *now["commands"]]}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    temporary.rename(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _plain(value: Any) -> Any:
    """Turn numbers that JSON has no words for into null."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _span(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
