"""The files of a run, read for its report."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqf.protocols import VALIDATION_PREFIX
from vqf.run_files import (
    elapsed_seconds,
    evaluation_files,
    is_finite,
    log_times,
    read_json,
    read_metrics,
    read_yaml,
)

EVALUATION_PREFIX = "evaluation/"  # of keys that pipeline=evaluate logs
STAGES = ("stage1", "stage2")
STEP_SUFFIX = re.compile(r"-\d{8}$")  # <name>-<step>.png; the newest is also written as <name>-latest.png

Curves = dict[str, list[tuple[float, float]]]  # (step, value) by key


@dataclass
class RunPart:
    """The curves of a run or a stage."""

    folder: Path
    name: str  # "" for the run itself
    training: Curves
    validation: Curves
    seconds: float

    @property
    def heading(self) -> str:
        own = "Training" if self.training else "Checkpoint by checkpoint"
        names = {"": own, "stage1": "Stage 1, the tokenizer", "stage2": "Stage 2, the prior"}
        return names.get(self.name, self.name.capitalize())

    @property
    def keys(self) -> list[str]:
        keys = list(dict.fromkeys([*self.validation, *self.training]))
        return sorted(keys, key=lambda key: (key.startswith("lr/"), key != "loss", key not in self.validation))

    def series(self, key: str) -> Curves:
        curves = {"training": self.training.get(key), "validation": self.validation.get(key)}
        return {name: points for name, points in curves.items() if points}


def read_parts(run_dir: Path) -> list[RunPart]:
    """Read the curves of a run and its stages."""
    return [_read_part(path.parent, run_dir) for path in sorted(run_dir.rglob("metrics.jsonl"))]


def _read_part(folder: Path, run_dir: Path) -> RunPart:
    training: Curves = {}
    validation: Curves = {}
    lines = list(read_metrics(folder / "metrics.jsonl"))
    for line in lines:
        for key, value in line.items():
            if key not in ("step", "time") and is_finite(value):
                prefix = next((each for each in (VALIDATION_PREFIX, EVALUATION_PREFIX) if key.startswith(each)), "")
                curves = validation if prefix else training
                curves.setdefault(key.removeprefix(prefix), []).append((line["step"], value))
    name = "" if folder == run_dir else str(folder.relative_to(run_dir))
    return RunPart(folder, name, training, validation, elapsed_seconds(log_times(lines)))


def read_evaluations(run_dir: Path) -> list[list[dict[str, Any]]]:
    """Read evaluations by protocol, in the order of steps."""
    by_protocol: dict[Path, list[dict[str, Any]]] = {}
    for folder in (run_dir, *(run_dir / stage for stage in STAGES)):
        for path in evaluation_files(folder):
            if is_evaluation(content := read_json(path)):
                by_protocol.setdefault(path.parent.parent, []).append(content)
    return list(by_protocol.values())


def is_evaluation(content: Mapping[str, Any]) -> bool:
    """Tell whether pipeline=evaluate wrote a JSON file."""
    return isinstance(content.get("values"), dict) and isinstance(content.get("protocol"), dict)


def checkpoint_curves(run_dir: Path) -> list[RunPart]:
    """Return each protocol's metrics over checkpoints."""
    parts = []
    for files in read_evaluations(run_dir):
        curves: Curves = {}
        for content in files:
            step = (content.get("checkpoint") or {}).get("step")
            for key, value in content["values"].items():
                if isinstance(step, int) and isinstance(value, int | float):
                    curves.setdefault(key, []).append((step, value))
        parts.append(RunPart(run_dir, f"checkpoints by {files[-1]['protocol'].get('name', '')}", {}, curves, 0.0))
    return parts


def latest_images(folder: Path) -> dict[str, Path]:
    """Return the newest file of every name."""
    newest = [path for path in sorted((folder / "images").glob("*.png")) if not STEP_SUFFIX.search(path.stem)]
    return {path.stem.removesuffix("-latest"): path for path in newest}


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint, unverified."""
    return max(folder.glob("checkpoints/step-*"), default=None)


def command(run_dir: Path, summary: Mapping[str, Any]) -> str:
    """Return the command that made a run; else ""."""
    if recorded := summary.get("command"):
        return shlex.join(recorded) if isinstance(recorded, list) else str(recorded)
    from omegaconf import OmegaConf

    path = run_dir / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return ""
    try:
        overrides = OmegaConf.to_container(read_yaml(path), resolve=False)
    except (OSError, ValueError):
        return ""
    return shlex.join(["python", "-m", "vqf.run", *(str(each) for each in overrides or ())])
