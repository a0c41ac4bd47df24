"""Runs on disk, read as far as possible."""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from vqf.errors import UserError
from vqf.pipelines.comparison.metrics import MetricValue, MetricValues, evaluation_metrics, training_metrics
from vqf.run_files.aside import warn_once
from vqf.run_files.metrics_log import LogTotals, missing_steps, read_metrics
from vqf.run_files.records import read_config_record, read_record, read_tail
from vqf.run_files.shapes import SUMMARY
from vqf.runs.checkpoint import CHECKPOINTS_FOLDER, Checkpoint, latest_checkpoint, open_checkpoint, run_dir_of
from vqf.runs.checkpoint_files import MANIFEST, BrokenCheckpointError

STAGES = ("stage1", "stage2")
TRAINING_PIPELINES = (*STAGES, "full")  # their run folders can be compared
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \S+ (\w+) (.*)")  # of log.txt: time, level, message


@dataclass
class Run:
    """A run, or what is left of it.

    Attributes:
        path: As given: the folder, or one of its checkpoints.
        status: Why the run is incomplete; "" for a finished one.
        step: Optimizer steps taken, over both stages.
        steps: As planned.
        seconds: Wall time.
        processor_seconds: CPU time; None if unknown.
        checkpoints: The tokenizer's first.
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
        return next(iter(self.checkpoints), None)

    @property
    def prior(self) -> Checkpoint | None:
        return next((checkpoint for checkpoint in self.checkpoints if checkpoint.kind == "stage2"), None)

    def add_metrics(self, values: MetricValues) -> None:
        for key, metric in values:
            self.metrics.setdefault(key, []).append(metric)


def find_runs(folders: str | Iterable[str]) -> list[Path]:
    """Expand folders into runs and checkpoints: a folder that is no run stands for the runs in it.

    Raises:
        UserError: If a folder is missing, or holds no run.
    """
    specs = [folders] if isinstance(folders, str) else [str(folder) for folder in folders]
    paths = [path for spec in specs for path in _expand(spec)]
    if not paths:
        raise UserError("runs=[]: give runs=[FOLDER,FOLDER], or the folder of a sweep")
    return list({path.resolve(): path for path in paths}.values())


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Read runs; each is named by the shortest unique end of its path."""
    runs = [read_run(path) for path in paths]
    for run, name in zip(runs, _unique_names([run.path for run in runs]), strict=True):
        run.name = name
    return runs


def read_run(path: Path) -> Run:
    """Read a run with its newest checkpoint, or the one that `path` is."""
    checkpoint_dir = path if (path / MANIFEST).is_file() else None
    run = Run(run_dir_of(path), path, config=_composed_config(run_dir_of(path)))
    subrun_dirs = [folder for folder in (run.folder / stage for stage in STAGES) if folder.is_dir()] or [run.folder]
    processor_seconds = [_read_stage(run, folder, checkpoint_dir) for folder in subrun_dirs]
    run.processor_seconds = None if None in processor_seconds else sum(each or 0 for each in processor_seconds)
    for folder in dict.fromkeys([run.folder, *subrun_dirs]):
        run.add_metrics(evaluation_metrics(folder, run.checkpoints, same_step=checkpoint_dir is not None))
    run.config = run.checkpoints[0].config if run.checkpoints else run.config
    run.status = run.status or _status(run, subrun_dirs)
    return run


def _read_stage(run: Run, folder: Path, checkpoint_dir: Path | None) -> float | None:
    totals = LogTotals()
    lines = totals.follow(read_metrics(folder / "metrics.jsonl"))
    checkpoint = _open_checkpoint(run, folder, checkpoint_dir)
    if checkpoint is not None:
        run.checkpoints.append(checkpoint)
        run.step, run.steps = run.step + checkpoint.step, run.steps + _planned_steps(checkpoint)
        run.add_metrics(training_metrics(checkpoint, lines))
    deque(lines, maxlen=0)  # read on to the end, without a checkpoint from the start
    run.seconds += totals.seconds
    last_logged = checkpoint.state.get("last_logged", 0) if checkpoint else 0
    if message := missing_steps(folder / "metrics.jsonl", totals.last_step, last_logged):
        warn_once(message)
    if totals.processes > 1:  # the summary counts the last one only
        return None
    return read_record(folder / "summary.json", SUMMARY).get("processor_seconds")


def _expand(spec: str) -> Iterator[Path]:
    path = Path(spec).expanduser()
    if not path.is_dir():
        raise UserError(f"runs={spec}: no such folder in {Path.cwd()}")
    if (path / MANIFEST).is_file() or _is_run(path):
        yield path
        return
    runs = sorted((folder for folder in path.iterdir() if folder.is_dir() and _is_run(folder)), key=_natural_key)
    if not runs:
        raise UserError(f"runs={spec}: neither a run nor a folder of runs of pipeline=stage1, stage2 or full")
    yield from runs


def _is_run(folder: Path) -> bool:
    if any((folder / subrun / CHECKPOINTS_FOLDER).is_dir() for subrun in (".", *STAGES)):
        return True
    config = _composed_config(folder)
    return config is not None and OmegaConf.select(config, "pipeline.name") in TRAINING_PIPELINES


def _natural_key(folder: Path) -> tuple[int, str]:
    return (int(folder.name), "") if folder.name.isdigit() else (0, folder.name)


def _unique_names(paths: list[Path]) -> list[str]:
    all_parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, all_parts), default=0) + 1):
        names = ["/".join(parts[-count:]) for parts in all_parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("paths differ: find_runs removes duplicates")


def _open_checkpoint(run: Run, subrun_dir: Path, checkpoint_dir: Path | None) -> Checkpoint | None:
    try:
        return open_checkpoint(checkpoint_dir) if checkpoint_dir else latest_checkpoint(subrun_dir)
    except BrokenCheckpointError as error:
        run.status = str(error)
        return None


def _planned_steps(checkpoint: Checkpoint) -> int:
    planned = checkpoint.config.get("steps") if checkpoint.state.get("data") else None
    return max(planned, checkpoint.step) if isinstance(planned, int) else checkpoint.step


def _status(run: Run, subrun_dirs: list[Path]) -> str:
    has_stages = any((run.folder / stage).is_dir() for stage in STAGES)
    incomplete = len(run.checkpoints) < (len(STAGES) if has_stages else 1)
    if run.step >= run.steps and not incomplete:
        return ""
    errors = [_logged_error(folder / "log.txt") for folder in dict.fromkeys([run.folder, *subrun_dirs])]
    if error := next(filter(None, errors), ""):
        return f"failed: {error}"
    if not run.checkpoints:
        return "no checkpoint yet"
    return f"{run.step:,} of {run.steps:,} steps" if run.step < run.steps else "stage 2 has no checkpoint yet"


def _logged_error(path: Path) -> str:
    messages = [match for line in read_tail(path).splitlines() if (match := LOG_LINE.match(line))]
    return messages[-1][2] if messages and messages[-1][1] == "ERROR" else ""


def _composed_config(folder: Path) -> DictConfig | None:
    config = read_config_record(folder / ".hydra" / "config.yaml")
    return config if isinstance(config, DictConfig) else None
