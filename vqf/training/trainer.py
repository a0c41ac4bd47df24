"""The training loop: how long, on what, and when to look, log and save. What is optimised is the stage's business."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.batch import Batch
from vqf.distributed import comm
from vqf.distributed.engine import Engine, seed_everything
from vqf.errors import UserError
from vqf.evaluation.validation import Evaluation
from vqf.runs import checkpoint as checkpoints
from vqf.runs import checkpoint_writer
from vqf.runs.async_checkpointer import Saver
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.resume import check_fit, find_start, shared
from vqf.runs.retention import best_by
from vqf.runs.run_logger import HELD_OUT, Journal, start_run
from vqf.terminal import log
from vqf.training.alarms import Watch, alarms
from vqf.training.nonfinite import Guard, Trouble
from vqf.training.out_of_memory import explained
from vqf.training.preemption import TERMINATED, Signals
from vqf.training.task import Stage
from vqf.training.train_state import Training

IN_THE_BAR = 4  # numbers behind the progress bar

Batches = Callable[[int, int], Iterator[Batch]]


@dataclass
class Progress:
    """Where a run stands, as `state.json` has it."""

    step: int = 0  # steps done
    passed: int = 0  # batches passed over by going back: the next one is number step + passed
    best: float | None = None  # score of the best look so far
    look: dict[str, Any] | None = None  # at held-out pictures, the last one: its step, and its values
    due: bool = False  # whether a look follows before the next step


def train(
    stage: Stage, config: DictConfig, run_dir: Path, engine: Engine, batches: Batches, part: str = ""
) -> Evaluation:
    """Train a stage, and return the last look at held-out pictures.

    Args:
        batches: Given the number of the first batch and of the one to stop before, yields them.
        part: What this is of a longer run, for loggers.

    Raises:
        UserError: If this is not the run that it would go on with, which stays as it is.
        SystemExit: After SIGTERM, when all is saved.
    """
    loop = Loop(stage, config, run_dir, engine)
    loop.begin()
    with start_run(config, run_dir, part=part) as journal:
        return loop.run(batches, journal)


class Loop:
    """Runs a stage for `config.steps` optimizer steps, from the newest checkpoint if there is one to resume."""

    journal: Journal
    saver: Saver

    def __init__(self, stage: Stage, config: DictConfig, run_dir: Path, engine: Engine) -> None:
        self.stage, self.config, self.run_dir, self.engine = stage, config, run_dir, engine
        self.training = Training(stage, config, engine)
        self.progress = Progress()
        self.guard, self.watch, self.signals = Guard(stage.kind, config.guard), Watch(alarms(config.model)), Signals()
        self.best = best_by(config.checkpoint.best, stage.higher_is_better)
        self.goes_back = self.guard.policy == "rollback"
        self.found: Checkpoint | None = None

    def begin(self) -> None:
        """Become the checkpoint that is to be resumed, if there is one. Nothing is written."""
        self.found = find_start(self.config, self.run_dir, self.stage.kind)
        if self.found is not None:
            check_fit(self.found, self.config, self.stage.facts)
            self._become(self.found)

    def run(self, batches: Batches, journal: Journal) -> Evaluation:
        """Train, then look once more and save."""
        every = self.config.checkpoint.every if self.goes_back else None
        self.journal = journal
        self.saver = Saver(self.run_dir, self.config.checkpoint, self.best, before=journal.sync, every=every)
        with closing(self.saver), self.signals:
            self._forget()
            if (self.goes_back and self.found is None) or (self.progress.due and not self._found_here()):
                self._save(self.progress.due)  # or there would be nothing to go back to, or to note a look in
            with terminal.progress(self.stage.kind, self.config.steps, self.progress.step) as bar:
                while self.progress.step < self.config.steps:
                    self._go(batches, bar)
            return self._conclude()

    def _go(self, batches: Batches, bar: terminal.Bar) -> None:
        """Take steps: all that are left, or until some have to be undone."""
        if self.progress.due:
            self._look()
        first = self.progress.step + self.progress.passed
        with closing(batches(first, self.config.steps + self.progress.passed)) as source:  # type: ignore[type-var]
            for batch in source:
                values = self._step(batch)
                bar.advance()
                if trouble := self._after(values, bar):
                    bar.advance(-self._go_back(trouble))
                    return

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        progress, kind = self.progress, self.stage.kind
        seed_everything(self.config.seed, kind, progress.step + progress.passed)
        with explained(f"{kind}, step {progress.step + 1}", kind, self.config):
            values = self.stage.step(progress.step, batch.to(self.engine.device))
        self.guard.see(progress.step, values)
        self.training.follow(progress.step)
        progress.step += 1
        return values

    def _after(self, values: Mapping[str, Tensor], bar: terminal.Bar) -> Trouble | None:
        """Do what is due between two steps; returns what asks for going back, if anything does."""
        done, config = self.progress.step, self.config
        last, asked = done == config.steps, self.signals.save()
        logs = last or done % config.log.every == 0
        looks = not last and done % config.evaluate.every == 0
        saves = asked or looks or (not last and done % config.checkpoint.every == 0)
        if logs:
            bar.advance(0, terminal.note(dict(list(self._log(values).items())[:IN_THE_BAR])))
        if trouble := self._trouble(logs or looks or saves):
            return trouble
        self.saver.check()
        ends = asked and self.signals.end()
        if ends or looks:
            self.saver.settle()  # or this one might be passed over
        if saves:
            self._save(due=looks)
        if ends:
            self._end()
        if looks:
            self._look()
        return None

    def _look(self) -> None:
        """Look at held-out pictures; a process that ends meanwhile is resumed here, for a scheduler may not wait."""
        self._record(self._evaluate())
        self._amend()
        if self.signals.save() and self.signals.end():
            self._end()

    def _trouble(self, due: bool) -> Trouble | None:
        """Read the guard's record, which a GPU would be waited for: only where something waits for it anyway."""
        moved = all(player.moved for player in self.stage.players.values())
        if due or self.guard.policy == "skip" or self.engine.device.type == "cpu":
            return self.guard.read(moved)
        return None

    def _log(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        scalars = joint({key: float(value) for key, value in values.items()})
        self._say(scalars | self.training.rates())
        return scalars

    def _say(self, values: Mapping[str, float]) -> None:
        self.journal.scalars(self.progress.step, values)
        if comm.first():
            self.watch.look(self.progress.step, values)

    def _evaluate(self, last: bool = False) -> Evaluation:
        if self.config.workers:
            self.saver.settle()  # processes are forked now, and should not be while a thread writes
        model = self.stage.model
        model.eval()
        seed_everything(self.config.seed, "evaluate")
        averaged = self.training.average.applied() if self.training.average else nullcontext()
        with (
            torch.no_grad(),
            averaged,
            self.engine.whole(model),
            explained(f"{self.stage.kind}, held-out pictures", self.stage.kind, self.config),
        ):
            evaluation = self.stage.evaluate(model)
            if last:
                evaluation = evaluation.join(self.stage.conclude(model))
        model.train()
        return evaluation

    def _record(self, evaluation: Evaluation) -> None:
        """Hand a look to the loggers, and keep its score if it is the best so far."""
        progress = self.progress
        self._say({f"{HELD_OUT}{key}": value for key, value in evaluation.scalars.items()})
        for name, images in evaluation.images.items():
            self.journal.images(progress.step, name, images)
        self.journal.details(evaluation.details)
        progress.look = {"step": progress.step, "values": evaluation.scalars}
        score = self.best.score(asdict(progress)) if self.best else -math.inf
        if score > (-math.inf if progress.best is None else progress.best):
            progress.best = score

    def _state(self) -> dict[str, Any]:
        state = {"kind": self.stage.kind, "seed": self.config.seed, **self.stage.facts, **asdict(self.progress)}
        return {**state, "guard": self.guard.state(), "watch": self.watch.state()}

    def _save(self, due: bool = False) -> None:
        self.progress.due = due
        if (snapshot := self.training.snapshot(self._state())) is not None:
            self.saver.save(snapshot)
        if self.progress.step % self.config.checkpoint.every == 0:
            self.guard.saved()

    def _amend(self) -> None:
        """Note a look in the checkpoint that was saved before it."""
        self.progress.due = False
        if comm.first():
            self.saver.amend(self._state())

    def _become(self, found: Checkpoint) -> None:
        self.training.restore(found)
        self.progress = Progress(**{each.name: found.state.get(each.name, each.default) for each in fields(Progress)})
        self.guard.load(found.state.get("guard", {}))
        self.watch.load(found.state.get("watch", {}))
        comm.wait()  # every process has read it

    def _found_here(self) -> bool:
        return self.found is not None and checkpoints.run_folder(self.found.path).resolve() == self.run_dir.resolve()

    def _forget(self) -> None:
        """Clear what came later than this in another life of the run."""
        step = self.progress.step if self.found else -1
        if comm.first():
            checkpoint_writer.set_aside(self.run_dir, step)
        self.journal.rewind(step, looked=not self.progress.due)
        if self.found:
            log.info("going on from %s", self.found.path)

    def _go_back(self, trouble: Trouble) -> int:
        """Go back to the newest checkpoint, to go on from there with the batch after the one that made the trouble.

        PaLM, https://arxiv.org/abs/2204.02311, section 5.1. Only checkpoints at multiples of checkpoint.every count,
        so that a run does not depend on when it was asked for others. Returns how many steps are undone.
        """
        self.saver.settle()
        before, every = self.progress, self.config.checkpoint.every
        found = shared(lambda: checkpoints.newest(self.run_dir, every))
        if found is None:
            raise UserError(f"{self.stage.kind}, step {trouble.step + 1}: {trouble.words}; no checkpoint to go back to")
        self.found = found
        self._become(found)
        self._forget()
        self.progress.passed = trouble.step + before.passed + 1 - found.step
        if comm.first():
            log.warning("back at step %d, and on with other pictures", found.step)
        return before.step - found.step

    def _conclude(self) -> Evaluation:
        """Look at held-out pictures with the final weights and save, unless an earlier process of the run did."""
        known = self.progress.look is not None and self.progress.look["step"] == self.config.steps
        if not known and not self.progress.due:
            self.saver.settle()
            self._save(due=True)
        evaluation = self._evaluate(last=True)
        if not known:
            self._record(evaluation)
            self._amend()
            self.saver.finish()
        comm.wait()  # what follows may read what the first process has written
        if self.signals.save() and self.signals.end():
            self._end()
        return evaluation

    def _end(self) -> NoReturn:
        self.saver.finish()
        comm.wait()
        log.info("ended by SIGTERM, saved at step %d; resume=true goes on", self.progress.step)
        raise SystemExit(TERMINATED)


def joint(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each number over the processes, each of which saw as many pictures."""
    means = comm.mean(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()
    return dict(zip(values, means, strict=True))
