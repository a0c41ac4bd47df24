"""The files of a run, read for its report."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vqf.loggers.report.curve_points import Curve
from vqf.protocols import VALIDATION_PREFIX
from vqf.run_files.aside import warn_once
from vqf.run_files.metrics_log import LogTotals, missing_steps, read_metrics
from vqf.run_files.records import evaluation_files, read_config_record, read_record
from vqf.run_files.shapes import DETAILS, METRICS, STATE, is_finite

EVALUATION_PREFIX = "evaluation/"  # of keys that pipeline=evaluate logs
STAGES = ("stage1", "stage2")
STEP_SUFFIX = re.compile(r"-\d{8}$")  # <name>-<step>.png; the newest is also written as <name>-latest.png

Curves = dict[str, Curve]  # by key


@dataclass
class RunPart:
    """The curves of a run or a stage."""

    folder: Path
    name: str = ""  # "" for the run itself
    training: Curves = field(default_factory=dict)
    validation: Curves = field(default_factory=dict)
    seconds: float = 0.0

    @cached_property
    def details(self) -> dict[str, Any]:
        """What is known of the images, by their name."""
        return read_record(self.folder / "details.json", DETAILS)

    @property
    def heading(self) -> str:
        own = "Training" if self.training else "Checkpoint by checkpoint"
        names = {"": own, "stage1": "Stage 1, the tokenizer", "stage2": "Stage 2, the prior"}
        return names.get(self.name, self.name.capitalize())

    @property
    def keys(self) -> list[str]:
        keys = list(dict.fromkeys([*self.validation, *self.training]))
        return sorted(keys, key=lambda key: (key.startswith("lr/"), key != "loss", key not in self.validation))

    @property
    def last_validation_step(self) -> float | None:
        curve = next(iter(self.validation.values()), Curve())
        return curve.last[0] if curve.last else None

    def series(self, key: str) -> Curves:
        curves = {"training": self.training.get(key), "validation": self.validation.get(key)}
        return {name: curve for name, curve in curves.items() if curve}


def read_parts(run_dir: Path) -> list[RunPart]:
    """Read the curves of a run and its stages."""
    return [_read_part(path.parent, run_dir) for path in sorted(run_dir.rglob("metrics.jsonl"))]


def _read_part(folder: Path, run_dir: Path) -> RunPart:
    training: Curves = {}
    validation: Curves = {}
    totals = LogTotals()
    for line in totals.follow(read_metrics(folder / "metrics.jsonl")):
        for key, value in line.items():
            if key not in ("step", "time") and is_finite(value):
                prefix = next((each for each in (VALIDATION_PREFIX, EVALUATION_PREFIX) if key.startswith(each)), "")
                curves = validation if prefix else training
                curves.setdefault(key.removeprefix(prefix), Curve()).add(line["step"], value)
    state = read_record(checkpoint / "state.json", STATE) if (checkpoint := newest_checkpoint(folder)) else {}
    if message := missing_steps(folder / "metrics.jsonl", totals.last_step, state.get("last_logged", 0)):
        warn_once(message)
    name = "" if folder == run_dir else str(folder.relative_to(run_dir))
    return RunPart(folder, name, training, validation, totals.seconds)


def read_evaluations(run_dir: Path) -> list[list[dict[str, Any]]]:
    """Read evaluations by protocol, in the order of steps."""
    by_protocol: dict[Path, list[dict[str, Any]]] = {}
    for folder in (run_dir, *(run_dir / stage for stage in STAGES)):
        for path in evaluation_files(folder):
            if is_evaluation(content := read_record(path, METRICS)):
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
            step = content.get("checkpoint", {}).get("step")
            for key, value in content["values"].items():
                if step is not None and is_finite(value):
                    curves.setdefault(key, Curve()).add(step, value)
        name = f"checkpoints by {files[-1]['protocol'].get('name', '')}"
        parts.append(RunPart(run_dir, name, validation=curves))
    return parts


def latest_images(folder: Path) -> dict[str, Path]:
    """Return the newest file of every name."""
    paths = sorted((folder / "images").glob("*.png"))
    newest = [path for path in paths if path.is_file() and not STEP_SUFFIX.search(path.stem)]
    return {path.stem.removesuffix("-latest"): path for path in newest}


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint, unverified."""
    return max(folder.glob("checkpoints/step-*"), default=None)


def command(run_dir: Path, summary: Mapping[str, Any]) -> str:
    """Return the command that made a run; else ""."""
    if recorded := summary.get("command"):
        return shlex.join(recorded) if isinstance(recorded, list) else str(recorded)
    overrides = read_config_record(run_dir / ".hydra" / "overrides.yaml")
    if overrides is None:
        return ""
    words = OmegaConf.to_container(overrides, resolve=False)
    return shlex.join(["python", "-m", "vqf.run", *map(str, words if isinstance(words, list) else [])])
