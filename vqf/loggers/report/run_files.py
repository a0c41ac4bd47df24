"""What a run left on disk, read again: numbers, images, config, command. Anything may be missing or cut short."""

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqf.protocols import VALIDATION_PREFIX

HELD_OUT_PREFIXES = (VALIDATION_PREFIX, "evaluation/")  # of numbers of held-out images
STAGES = ("stage1", "stage2")
STEP_SUFFIX = re.compile(r"-\d{8}$")  # an image of one step; the newest is also there as <name>-latest


@dataclass
class RunPart:
    """A folder with a `metrics.jsonl`: the run itself, or one stage of it."""

    folder: Path
    name: str
    training: dict[str, list[tuple[float, float]]]  # key -> (step, value)
    validation: dict[str, list[tuple[float, float]]]
    seconds: float

    @property
    def heading(self) -> str:
        """What it is called."""
        own = "Training" if self.training else "Checkpoint by checkpoint"
        names = {"": own, "stage1": "Stage 1, the tokenizer", "stage2": "Stage 2, the prior"}
        return names.get(self.name, self.name.capitalize())

    @property
    def keys(self) -> list[str]:
        """Every key: the loss, those that were also measured on held-out data, the others, learning rates."""
        keys = list(dict.fromkeys([*self.validation, *self.training]))
        return sorted(keys, key=lambda key: (key.startswith("lr/"), key != "loss", key not in self.validation))

    def series(self, key: str) -> dict[str, list[tuple[float, float]]]:
        """Return the curves of one key."""
        found = {"training": self.training.get(key), "validation": self.validation.get(key)}
        return {name: points for name, points in found.items() if points}


def read_parts(run_dir: Path) -> list[RunPart]:
    """Read the run's own `metrics.jsonl`, and those of its stages."""
    return [_read_part(path.parent, run_dir) for path in sorted(run_dir.rglob("metrics.jsonl"))]


def read_evaluations(run_dir: Path) -> list[list[dict[str, Any]]]:
    """Read what `pipeline=evaluate` measured of a run and its stages: for each protocol, its files by step."""
    found: dict[Path, list[dict[str, Any]]] = {}
    for folder in (run_dir, *(run_dir / stage for stage in STAGES)):
        for path in sorted(folder.glob("evaluations/*/*/metrics.json")):
            if is_evaluation(content := read_json(path)):
                found.setdefault(path.parent.parent, []).append(content)
    return list(found.values())


def is_evaluation(content: Mapping[str, Any]) -> bool:
    """Tell whether a file holds numbers by a protocol."""
    return isinstance(content.get("values"), dict) and isinstance(content.get("protocol"), dict)


def checkpoint_curves(run_dir: Path) -> list[RunPart]:
    """Return the curves of numbers that one protocol measured of several checkpoints."""
    found = []
    for files in read_evaluations(run_dir):
        curves: dict[str, list[tuple[float, float]]] = {}
        for content in files:
            step = (content.get("checkpoint") or {}).get("step")
            for key, value in content["values"].items():
                if isinstance(step, int) and isinstance(value, int | float):
                    curves.setdefault(key, []).append((step, value))
        found.append(RunPart(run_dir, f"checkpoints by {files[-1]['protocol'].get('name', '')}", {}, curves, 0.0))
    return found


def latest_images(folder: Path) -> dict[str, Path]:
    """Return the newest image of every name in the `images/` of a folder."""
    newest = [path for path in sorted((folder / "images").glob("*.png")) if not STEP_SUFFIX.search(path.stem)]
    return {path.stem.removesuffix("-latest"): path for path in newest}


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a folder, whole or not: only its config is read."""
    return max(folder.glob("checkpoints/step-*"), default=None)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} where there is none, or no whole one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_text(path: Path) -> str:
    """Read a text file; empty where there is none."""
    return path.read_text(errors="replace") if path.is_file() else ""


def command(run_dir: Path, summary: Mapping[str, Any]) -> str:
    """Word the command that made a run: as recorded, or from Hydra's list of overrides."""
    if recorded := summary.get("command"):
        return shlex.join(recorded) if isinstance(recorded, list) else str(recorded)
    from omegaconf import OmegaConf

    path = run_dir / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return ""
    overrides = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return shlex.join(["python", "-m", "vqf.run", *(str(each) for each in overrides or ())])


def _read_part(folder: Path, run_dir: Path) -> RunPart:
    training: dict[str, list[tuple[float, float]]] = {}
    validation: dict[str, list[tuple[float, float]]] = {}
    times = [0.0]
    for line in _read_metrics(folder / "metrics.jsonl"):
        step, now = line.pop("step"), line.pop("time", None)
        if isinstance(now, int | float):
            times.append(now)
        for key, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                prefix = next((each for each in HELD_OUT_PREFIXES if key.startswith(each)), "")
                kept = validation if prefix else training
                kept.setdefault(key.removeprefix(prefix), []).append((step, value))
    name = "" if folder == run_dir else str(folder.relative_to(run_dir))
    return RunPart(folder, name, training, validation, _elapsed(times))


def _read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    for line in read_text(path).splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # half-written by a process that was killed
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int | float):
            yield values


def _elapsed(times: list[float]) -> float:
    """Add up the clocks of every process: each starts from zero."""
    ends = [now for now, after in zip(times, [*times[1:], -1.0], strict=True) if after < now]
    return sum(ends)
