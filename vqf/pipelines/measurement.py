"""What an evaluation found: numbers, and every fact that they depend on, in one file."""

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from vqf import terminal
from vqf.pipelines.checkpoint import MANIFEST, Checkpoint
from vqf.pipelines.evaluation_protocol import digest
from vqf.protocols import Comparison
from vqf.terminal import log
from vqf.weights import sha256

FOLDER = "evaluations"
FILE = "metrics.json"
PACKAGES = ("vqf", "torch", "torch-fidelity", "timm", "numpy")
MERGED = ("values", "intervals", "floors", "settings")


@dataclass
class Measurement:
    """Numbers by one protocol."""

    protocol: dict[str, Any] = field(default_factory=dict)  # its lines, then its hash
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %
    floors: dict[str, float] = field(default_factory=dict)  # the same metric of real pictures against real ones
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the metric that gave each number
    grids: dict[str, Tensor] = field(default_factory=dict)  # pictures to show, (B, C, H, W)
    details: dict[str, Any] = field(default_factory=dict)  # what is said of them

    def add(self, found: Comparison, settings: dict[str, Any], floor: Mapping[str, float], prefix: str = "") -> None:
        """Add what a metric says."""
        self.values |= {f"{prefix}{key}": value for key, value in found.values.items()}
        self.intervals |= {f"{prefix}{key}": value for key, value in found.intervals.items()}
        self.floors |= {f"{prefix}{key}": value for key, value in floor.items()}
        self.settings |= {f"{prefix}{key}": settings for key in found.values}

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
    """Say which checkpoint was measured; the hash is that of its manifest, which hashes every file of it."""
    content = sha256(checkpoint.path / MANIFEST)
    return {"kind": checkpoint.kind, "step": checkpoint.step, "path": str(checkpoint.path), "sha256": content}


def circumstances(seconds: float, device: str, precision: str) -> dict[str, Any]:
    """Say what else could matter."""
    return {
        "command": shlex.join(["python", "-m", "vqf.run", *sys.argv[1:]]),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": device,
        "precision": precision,
        "seconds": round(seconds, 1),
    }


def save(found: Measurement, checkpoint: dict[str, Any], facts: dict[str, Any], run: Path, run_dir: Path) -> Path:
    """Write `metrics.json` below the run that was measured, and a copy in the folder of this one.

    Numbers of the same checkpoint by the same protocol that are there already are kept.
    """
    content = {"protocol": found.protocol, **{key: _plain(getattr(found, key)) for key in MERGED}}
    content |= {"checkpoint": checkpoint, **facts}
    path = run / FOLDER / found.folder / FILE
    earlier = _read(path)
    if earlier.get("checkpoint", {}).get("sha256") == checkpoint["sha256"]:
        content |= {key: earlier.get(key, {}) | content[key] for key in MERGED}
    _write(run_dir / FILE, content)
    try:
        _write(path, content)
    except OSError as error:
        log.warning("%s cannot be written (%s); the numbers are in %s", path, error.strerror, run_dir / FILE)
        return run_dir / FILE
    return path


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
