"""What runs left on disk, read for a comparison. Anything may be missing or cut short, and no run is lost for it."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.errors import UserError
from vqf.pipelines.comparison.metrics import (
    MetricValue,
    MetricValues,
    evaluation_metrics,
    is_number,
    read_json,
    training_metrics,
)
from vqf.runs.checkpoint import (
    CHECKPOINTS_FOLDER,
    MANIFEST,
    BrokenCheckpointError,
    Checkpoint,
    latest_checkpoint,
    open_checkpoint,
    run_dir_of,
)

STAGES = ("stage1", "stage2")
TRAINING_PIPELINES = (*STAGES, "full")  # pipelines whose folders are runs to compare
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \S+ (\w+) (.*)")  # a line of log.txt: level, message


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        folder: Where it lies.
        path: What was named: the folder, or one of its checkpoints.
        status: Why it is not, or not all, that it was to be; empty for one that is finished.
        steps: That it was to take; `step` of them are done.
        processor_seconds: None where they are not known.
        metrics: By metric, one for each protocol.
    """

    folder: Path
    path: Path
    name: str = ""
    status: str = ""
    config: DictConfig | None = None
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    processor_seconds: float | None = None
    checkpoints: list[Checkpoint] = field(default_factory=list)
    metrics: dict[str, list[MetricValue]] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Checkpoint | None:
        """The checkpoint that holds its tokenizer."""
        return next(iter(self.checkpoints), None)

    @property
    def prior(self) -> Checkpoint | None:
        """The checkpoint of its second stage."""
        return next((each for each in self.checkpoints if each.kind == "stage2"), None)

    def add_metrics(self, values: MetricValues) -> None:
        """Add numbers."""
        for key, number in values:
            self.metrics.setdefault(key, []).append(number)


def find_runs(folders: str | Iterable[str]) -> list[Path]:
    """Return the runs that `runs=` means: those it lists, and for a folder that is no run, those in it.

    Raises:
        UserError: If a folder is not there, or holds no run.
    """
    paths = [folders] if isinstance(folders, str) else [str(each) for each in folders]
    found = [run for path in paths for run in _expand(path)]
    if not found:
        raise UserError("runs=[]: give runs=[FOLDER,FOLDER], or the folder of a sweep")
    return list({each.resolve(): each for each in found}.values())


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Read runs, each under the shortest end of its path that tells it from the others."""
    runs = [read_run(path) for path in paths]
    for run, name in zip(runs, _unique_names([run.path for run in runs]), strict=True):
        run.name = name
    return runs


def read_run(path: Path) -> Run:
    """Read a run: its newest checkpoint, or the one that is given."""
    at = path if (path / MANIFEST).is_file() else None
    run = Run(run_dir_of(path), path, config=_composed_config(run_dir_of(path)))
    parts = [each for each in (run.folder / stage for stage in STAGES) if each.is_dir()] or [run.folder]
    processor = []
    for part in parts:
        lines, checkpoint = list(_read_metrics(part / "metrics.jsonl")), _open_checkpoint(run, part, at)
        run.seconds += _elapsed([line["time"] for line in lines if is_number(line.get("time"))])
        processor.append(_processor_seconds(part, lines))
        if checkpoint is not None:
            run.checkpoints.append(checkpoint)
            run.step, run.steps = run.step + checkpoint.step, run.steps + _planned_steps(checkpoint)
            run.add_metrics(training_metrics(checkpoint, lines))
    run.processor_seconds = None if None in processor else sum(each or 0 for each in processor)
    for folder in dict.fromkeys([run.folder, *parts]):
        run.add_metrics(evaluation_metrics(folder, run.checkpoints, same_step=at is not None))
    run.config = run.checkpoints[0].config if run.checkpoints else run.config
    run.status = run.status or _status(run, parts)
    return run


def _expand(spec: str) -> Iterator[Path]:
    path = Path(spec).expanduser()
    if not path.is_dir():
        raise UserError(f"runs={spec}: no such folder in {Path.cwd()}")
    if (path / MANIFEST).is_file() or _is_run(path):
        yield path
        return
    found = sorted((each for each in path.iterdir() if each.is_dir() and _is_run(each)), key=_natural_key)
    if not found:
        raise UserError(f"runs={spec}: neither a run nor a folder of runs, which are what training writes")
    yield from found


def _is_run(folder: Path) -> bool:
    if any((folder / each / CHECKPOINTS_FOLDER).is_dir() for each in (".", *STAGES)):
        return True
    config = _composed_config(folder)
    return config is not None and OmegaConf.select(config, "pipeline.name") in TRAINING_PIPELINES


def _natural_key(folder: Path) -> tuple[int, str]:
    """Sort job 10 of a sweep behind job 9."""
    return (int(folder.name), "") if folder.name.isdigit() else (0, folder.name)


def _unique_names(paths: list[Path]) -> list[str]:
    parts = [place.resolve().parts for place in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("places differ")


def _open_checkpoint(run: Run, subrun_dir: Path, checkpoint_dir: Path | None) -> Checkpoint | None:
    try:
        return open_checkpoint(checkpoint_dir) if checkpoint_dir else latest_checkpoint(subrun_dir)
    except BrokenCheckpointError as error:
        run.status = str(error)
        return None


def _planned_steps(checkpoint: Checkpoint) -> int:
    """Return the steps that a run was to take; one that came from another project takes none."""
    planned = checkpoint.config.get("steps") if checkpoint.state.get("data") else None
    return max(planned, checkpoint.step) if isinstance(planned, int) else checkpoint.step


def _status(run: Run, subrun_dirs: list[Path]) -> str:
    """Say why a run is not finished, in the words of its log where that has some."""
    both = any((run.folder / stage).is_dir() for stage in STAGES)
    lacks = len(run.checkpoints) < (len(STAGES) if both else 1)
    if run.step >= run.steps and not lacks:
        return ""
    mistakes = [_logged_error(folder / "log.txt") for folder in dict.fromkeys([run.folder, *subrun_dirs])]
    if known := next(filter(None, mistakes), ""):
        return f"failed: {known}"
    if not run.checkpoints:
        return "no checkpoint yet"
    return f"{run.step:,} of {run.steps:,} steps" if run.step < run.steps else "the second stage has no checkpoint yet"


def _logged_error(path: Path) -> str:
    """Return the mistake that ended a run, if it is the last thing that its log says."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    said = [found for line in text.splitlines() if (found := LOG_LINE.match(line))]
    return said[-1][2] if said and said[-1][1] == "ERROR" else ""


def _processor_seconds(subrun_dir: Path, lines: list[dict[str, Any]]) -> float | None:
    """Return the processor time of a run that was never interrupted: the summary knows the last process only."""
    times = [line["time"] for line in lines if is_number(line.get("time"))]
    interrupted = any(after < now for now, after in pairwise(times))
    return None if interrupted else read_json(subrun_dir / "summary.json").get("processor_seconds")


def _elapsed(times: list[float]) -> float:
    """Add up the clocks of every process: each starts from zero."""
    return sum(now for now, after in pairwise([*times, -1.0]) if after < now)


def _read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)
        except ValueError:  # half-written by a process that was killed
            continue
        if isinstance(values, dict) and is_number(values.get("step")):
            yield values


def _composed_config(folder: Path) -> DictConfig | None:
    try:
        config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    except Exception:  # missing, cut short, or no YAML
        return None
    return config if isinstance(config, DictConfig) else None
