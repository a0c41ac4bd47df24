"""The training loop: how long, on what, and when to look, log and save. What is optimised is the stage's business."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vqf import terminal
from vqf.errors import UserError
from vqf.pipelines import checkpoint as checkpoints
from vqf.pipelines.average import Average
from vqf.pipelines.engine import Engine, seed_everything
from vqf.pipelines.journal import Journal
from vqf.pipelines.watch import Watch
from vqf.protocols import Batch
from vqf.registry import build
from vqf.terminal import log

IN_THE_BAR = 4  # numbers behind the progress bar

# A schedule runs from the first step on, an optimizer that waits (the discriminator's) takes its first step later.
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)


@dataclass
class Evaluation:
    """What a look at held-out data shows."""

    scalars: dict[str, float]
    images: dict[str, Tensor] = field(default_factory=dict)


class Stage(Protocol):
    """What is optimised."""

    kind: str  # "stage1" or "stage2"

    @property
    def model(self) -> nn.Module: ...  # what is averaged and evaluated

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...  # what a checkpoint keeps, `model` under the name "model"

    @property
    def optimizers(self) -> Mapping[str, Optimizer]: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...  # kept in the checkpoint's state.json

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]: ...

    def evaluate(self, model: nn.Module) -> Evaluation: ...


class Loop:
    """Runs a stage for `config.steps` optimizer steps, from the newest checkpoint if there is one to resume."""

    def __init__(self, stage: Stage, config: DictConfig, run_dir: Path, engine: Engine, journal: Journal) -> None:
        self.stage, self.config, self.run_dir, self.engine, self.journal = stage, config, run_dir, engine, journal
        self.watch = Watch()
        self.average = None if config.ema is None else Average(stage.model, config.ema)
        self.schedules: dict[str, LRScheduler] = {
            name: build("schedule", config.schedule, optimizer=optimizer, steps=config.steps)
            for name, optimizer in stage.optimizers.items()
        }

    def run(self, batches: Callable[[int, int], Iterator[Batch]]) -> Evaluation:
        """Train, then look once more and save.

        Args:
            batches: Given the first step and the one to stop before, yields the batch of each.
        """
        config, start = self.config, self._resume()
        with (
            closing(batches(start, config.steps)) as source,  # type: ignore[type-var]
            terminal.progress(self.stage.kind, config.steps, start) as bar,
        ):
            for step, batch in enumerate(source, start):
                seed_everything(config.seed, self.stage.kind, step)
                values = self.stage.step(step, batch.to(self.engine.device))
                self._after(step, values, bar)
        evaluation = self._evaluate(config.steps)
        self._save(config.steps)
        return evaluation

    def _after(self, step: int, values: Mapping[str, Tensor], bar: terminal.Bar) -> None:
        done, config = step + 1, self.config
        for schedule in self.schedules.values():
            schedule.step()
        if self.average:
            self.average.update(self.stage.model, step)
        bar.advance()
        if done % config.log.every == 0 or done == config.steps:
            bar.advance(0, terminal.note(dict(list(self._log(done, values).items())[:IN_THE_BAR])))
        if done == config.steps:
            return
        if done % config.evaluate.every == 0:
            self._evaluate(done)
        if done % config.checkpoint.every == 0:
            self._save(done)

    def _log(self, step: int, values: Mapping[str, Tensor]) -> dict[str, float]:
        scalars = {key: float(value) for key, value in values.items()}
        bad = [key for key, value in scalars.items() if not math.isfinite(value)]
        rates = {f"lr/{name}": float(each.get_last_lr()[0]) for name, each in self.schedules.items()}
        self._record(step, scalars | rates)
        if bad:
            raise UserError(
                f"{self.stage.kind}, step {step}: '{bad[0]}' is {scalars[bad[0]]}; the newest checkpoint is kept. "
                f"Lower optimizer.lr, set clip=1, or warm up with schedule.warmup=0.05, and go on with resume=true"
            )
        return scalars

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        self.journal.scalars(step, values)
        self.watch.look(step, values)

    def _evaluate(self, step: int) -> Evaluation:
        model = self.average.module if self.average else self.stage.model
        model.eval()
        seed_everything(self.config.seed, "evaluate")
        with torch.no_grad():
            evaluation = self.stage.evaluate(model)
        model.train(not self.average)
        self._record(step, {f"validation/{key}": value for key, value in evaluation.scalars.items()})
        for name, images in evaluation.images.items():
            self.journal.images(step, name, images)
        return evaluation

    def _save(self, step: int) -> None:
        weights = {name: module.state_dict() for name, module in self.stage.modules.items()}
        if self.average:
            weights["ema"] = self.average.module.state_dict()
        states = {
            "optimizers": {name: each.state_dict() for name, each in self.stage.optimizers.items()},
            "schedules": {name: each.state_dict() for name, each in self.schedules.items()},
        }
        state = {"kind": self.stage.kind, "step": step, "seed": self.config.seed, **self.stage.facts}
        path = checkpoints.save(
            self.run_dir,
            state=state,
            config=self.config,
            weights=weights,
            optimizers=states,
            keep=self.config.checkpoint.keep,
        )
        log.info("saved %s", path)

    def _resume(self) -> int:
        found = find_resume(self.config.resume, self.run_dir)
        if found is None:
            self.journal.rewind(0)
            return 0
        if found.kind != self.stage.kind:
            raise UserError(f"resume: {found.path} is of a {found.kind} run, and this is {self.stage.kind}")
        for name, module in self.stage.modules.items():
            module.load_state_dict(found.weights(name))
        if self.average:
            self.average.module.load_state_dict(found.weights("ema"))
        states = found.optimizers()
        for name, optimizer in self.stage.optimizers.items():
            optimizer.load_state_dict(states["optimizers"][name])
            self.schedules[name].load_state_dict(states["schedules"][name])
        self.journal.rewind(found.step)
        log.info("going on from %s", found.path)
        return found.step


def find_resume(resume: bool | str, run_dir: Path) -> checkpoints.Checkpoint | None:
    """Open the checkpoint that `resume=` means: of this run's folder, or the one that is named.

    Raises:
        UserError: If a named folder has none. `resume=true` without any starts from the beginning, so that
            one command serves the first and every later process of a job.
    """
    if resume is False:
        return None
    path = run_dir if resume is True else Path(str(resume))
    found = checkpoints.open_checkpoint(path) if (path / checkpoints.MANIFEST).is_file() else checkpoints.newest(path)
    if found is None and resume is not True:
        raise UserError(f"resume={resume}: no whole checkpoint there; give a run's folder or one of its checkpoints")
    return found
