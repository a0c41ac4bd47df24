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
from vqf.evaluation.validation import ValidationResult
from vqf.runs import checkpoint as checkpoints
from vqf.runs import checkpoint_writer
from vqf.runs.async_checkpointer import AsyncCheckpointer
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.resume import check_same_run, find_on_main, find_start_checkpoint
from vqf.runs.retention import parse_best_criterion
from vqf.runs.run_logger import VALIDATION_PREFIX, RunLogger, start_run
from vqf.terminal import log
from vqf.training.alarms import AlarmMonitor, build_alarms
from vqf.training.nonfinite import NonFiniteEvent, NonFiniteGuard
from vqf.training.out_of_memory import explain_oom
from vqf.training.preemption import SIGTERM_EXIT_CODE, PreemptionSignals
from vqf.training.task import TrainingTask
from vqf.training.train_state import TrainState

MAX_BAR_METRICS = 4  # numbers behind the progress bar

BatchSource = Callable[[int, int], Iterator[Batch]]


@dataclass
class Progress:
    """Where a run stands, as `state.json` has it."""

    step: int = 0  # steps done
    skipped_batches: int = 0  # batches passed over by going back: the next one is number step + passed
    best: float | None = None  # score of the best look so far
    last_validation: dict[str, Any] | None = None  # at held-out images, the last one: its step, and its values
    validation_due: bool = False  # whether a look follows before the next step


def train(
    task: TrainingTask, config: DictConfig, run_dir: Path, engine: Engine, batch_source: BatchSource, subrun: str = ""
) -> ValidationResult:
    """Train a stage, and return the last look at held-out images.

    Args:
        batch_source: Given the number of the first batch and of the one to stop before, yields them.
        subrun: What this is of a longer run, for loggers.

    Raises:
        UserError: If this is not the run that it would go on with, which stays as it is.
        SystemExit: After SIGTERM, when all is saved.
    """
    loop = Trainer(task, config, run_dir, engine)
    loop.resume()
    with start_run(config, run_dir, subrun=subrun) as journal:
        return loop.run(batch_source, journal)


class Trainer:
    """Runs a stage for `config.steps` optimizer steps, from the newest checkpoint if there is one to resume."""

    run_logger: RunLogger
    checkpointer: AsyncCheckpointer

    def __init__(self, task: TrainingTask, config: DictConfig, run_dir: Path, engine: Engine) -> None:
        self.task, self.config, self.run_dir, self.engine = task, config, run_dir, engine
        self.train_state = TrainState(task, config, engine)
        self.progress = Progress()
        self.nonfinite_guard, self.alarm_monitor, self.preemption = (
            NonFiniteGuard(task.kind, config.nonfinite),
            AlarmMonitor(build_alarms(config.model)),
            PreemptionSignals(),
        )
        self.best_criterion = parse_best_criterion(config.checkpoint.best, task.higher_is_better)
        self.rollback_enabled = self.nonfinite_guard.action == "rollback"
        self.resumed_from: Checkpoint | None = None

    def resume(self) -> None:
        """Become the checkpoint that is to be resumed, if there is one. Nothing is written."""
        self.resumed_from = find_start_checkpoint(self.config, self.run_dir, self.task.kind)
        if self.resumed_from is not None:
            check_same_run(self.resumed_from, self.config, self.task.metadata)
            self._restore(self.resumed_from)

    def run(self, batch_source: BatchSource, run_logger: RunLogger) -> ValidationResult:
        """Train, then look once more and save."""
        every = self.config.checkpoint.every if self.rollback_enabled else None
        self.run_logger = run_logger
        self.checkpointer = AsyncCheckpointer(
            self.run_dir, self.config.checkpoint, self.best_criterion, before_write=run_logger.sync, every=every
        )
        with closing(self.checkpointer), self.preemption:
            self._discard_later()
            if (self.rollback_enabled and self.resumed_from is None) or (
                self.progress.validation_due and not self._resumes_in_place()
            ):
                self._save(
                    self.progress.validation_due
                )  # or there would be nothing to go back to, or to note a look in
            with terminal.progress(self.task.kind, self.config.steps, self.progress.step) as bar:
                while self.progress.step < self.config.steps:
                    self._train_until_rollback(batch_source, bar)
            return self._finish()

    def _train_until_rollback(self, batch_source: BatchSource, bar: terminal.ProgressBar) -> None:
        """Take steps: all that are left, or until some have to be undone."""
        if self.progress.validation_due:
            self._validate()
        first = self.progress.step + self.progress.skipped_batches
        with closing(batch_source(first, self.config.steps + self.progress.skipped_batches)) as source:  # type: ignore[type-var]
            for batch in source:
                values = self._train_step(batch)
                bar.advance()
                if trouble := self._after_step(values, bar):
                    bar.advance(-self._rollback(trouble))
                    return

    def _train_step(self, batch: Batch) -> dict[str, Tensor]:
        progress, kind = self.progress, self.task.kind
        seed_everything(self.config.seed, kind, progress.step + progress.skipped_batches)
        with explain_oom(f"{kind}, step {progress.step + 1}", kind, self.config):
            values = self.task.step(progress.step, batch.to(self.engine.device))
        self.nonfinite_guard.update(progress.step, values)
        self.train_state.after_step(progress.step)
        progress.step += 1
        return values

    def _after_step(self, values: Mapping[str, Tensor], bar: terminal.ProgressBar) -> NonFiniteEvent | None:
        """Do what is due between two steps; returns what asks for going back, if anything does."""
        done, config = self.progress.step, self.config
        last, asked = done == config.steps, self.preemption.should_save()
        logs = last or done % config.log.every == 0
        looks = not last and done % config.evaluate.every == 0
        saves = asked or looks or (not last and done % config.checkpoint.every == 0)
        if logs:
            bar.advance(0, terminal.format_metrics(dict(list(self._log_train_step(values).items())[:MAX_BAR_METRICS])))
        if trouble := self._poll_nonfinite(logs or looks or saves):
            return trouble
        self.checkpointer.check()
        ends = asked and self.preemption.should_stop()
        if ends or looks:
            self.checkpointer.wait()  # or this one might be passed over
        if saves:
            self._save(validation_due=looks)
        if ends:
            self._exit_preempted()
        if looks:
            self._validate()
        return None

    def _validate(self) -> None:
        """Look at held-out images; a process that ends meanwhile is resumed here, for a scheduler may not wait."""
        self._log_validation(self._evaluate())
        self._store_validation()
        if self.preemption.should_save() and self.preemption.should_stop():
            self._exit_preempted()

    def _poll_nonfinite(self, needed: bool) -> NonFiniteEvent | None:
        """Read the guard's record, which a GPU would be waited for: only where something waits for it anyway."""
        moved = all(player.stepped for player in self.task.optimizer_steps.values())
        if needed or self.nonfinite_guard.action == "skip" or self.engine.device.type == "cpu":
            return self.nonfinite_guard.poll(moved)
        return None

    def _log_train_step(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        scalars = all_reduce_scalars({key: float(value) for key, value in values.items()})
        self._log_scalars(scalars | self.train_state.learning_rates())
        return scalars

    def _log_scalars(self, values: Mapping[str, float]) -> None:
        self.run_logger.scalars(self.progress.step, values)
        if comm.is_main():
            self.alarm_monitor.check(self.progress.step, values)

    def _evaluate(self, final: bool = False) -> ValidationResult:
        if self.config.workers:
            self.checkpointer.wait()  # processes are forked now, and should not be while a thread writes
        model = self.task.model
        model.eval()
        seed_everything(self.config.seed, "evaluate")
        averaged = self.train_state.ema.average_parameters() if self.train_state.ema else nullcontext()
        with (
            torch.no_grad(),
            averaged,
            self.engine.unsharded(model),
            explain_oom(f"{self.task.kind}, held-out images", self.task.kind, self.config),
        ):
            evaluation = self.task.evaluate(model)
            if final:
                evaluation = evaluation.merge(self.task.final_validation(model))
        model.train()
        return evaluation

    def _log_validation(self, evaluation: ValidationResult) -> None:
        """Hand a look to the loggers, and keep its score if it is the best so far."""
        progress = self.progress
        self._log_scalars({f"{VALIDATION_PREFIX}{key}": value for key, value in evaluation.scalars.items()})
        for name, images in evaluation.images.items():
            self.run_logger.images(progress.step, name, images)
        self.run_logger.write_details(evaluation.details)
        progress.last_validation = {"step": progress.step, "values": evaluation.scalars}
        score = self.best_criterion.score(asdict(progress)) if self.best_criterion else -math.inf
        if score > (-math.inf if progress.best is None else progress.best):
            progress.best = score

    def _state(self) -> dict[str, Any]:
        state = {"kind": self.task.kind, "seed": self.config.seed, **self.task.metadata, **asdict(self.progress)}
        return {**state, "nonfinite": self.nonfinite_guard.state_dict(), "alarms": self.alarm_monitor.state_dict()}

    def _save(self, validation_due: bool = False) -> None:
        self.progress.validation_due = validation_due
        if (snapshot := self.train_state.snapshot(self._state())) is not None:
            self.checkpointer.save(snapshot)
        if self.progress.step % self.config.checkpoint.every == 0:
            self.nonfinite_guard.checkpoint_saved()

    def _store_validation(self) -> None:
        """Note a look in the checkpoint that was saved before it."""
        self.progress.validation_due = False
        if comm.is_main():
            self.checkpointer.update_state(self._state())

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.train_state.restore(checkpoint)
        self.progress = Progress(
            **{each.name: checkpoint.state.get(each.name, each.default) for each in fields(Progress)}
        )
        self.nonfinite_guard.load_state_dict(checkpoint.state.get("nonfinite", {}))
        self.alarm_monitor.load_state_dict(checkpoint.state.get("alarms", {}))
        comm.barrier()  # every process has read it

    def _resumes_in_place(self) -> bool:
        return (
            self.resumed_from is not None
            and checkpoints.run_dir_of(self.resumed_from.path).resolve() == self.run_dir.resolve()
        )

    def _discard_later(self) -> None:
        """Clear what came later than this in another life of the run."""
        step = self.progress.step if self.resumed_from else -1
        if comm.is_main():
            checkpoint_writer.archive_later(self.run_dir, step)
        self.run_logger.truncate_after(step, validated=not self.progress.validation_due)
        if self.resumed_from:
            log.info("going on from %s", self.resumed_from.path)

    def _rollback(self, event: NonFiniteEvent) -> int:
        """Go back to the newest checkpoint, to go on from there with the batch after the one that made the trouble.

        PaLM, https://arxiv.org/abs/2204.02311, section 5.1. Only checkpoints at multiples of checkpoint.every count,
        so that a run does not depend on when it was asked for others. Returns how many steps are undone.
        """
        self.checkpointer.wait()
        before, every = self.progress, self.config.checkpoint.every
        found = find_on_main(lambda: checkpoints.latest_checkpoint(self.run_dir, every))
        if found is None:
            raise UserError(f"{self.task.kind}, step {event.step + 1}: {event.message}; no checkpoint to go back to")
        self.resumed_from = found
        self._restore(found)
        self._discard_later()
        self.progress.skipped_batches = event.step + before.skipped_batches + 1 - found.step
        if comm.is_main():
            log.warning("back at step %d, and on with other images", found.step)
        return before.step - found.step

    def _finish(self) -> ValidationResult:
        """Look at held-out images with the final weights and save, unless an earlier process of the run did."""
        known = self.progress.last_validation is not None and self.progress.last_validation["step"] == self.config.steps
        if not known and not self.progress.validation_due:
            self.checkpointer.wait()
            self._save(validation_due=True)
        evaluation = self._evaluate(final=True)
        if not known:
            self._log_validation(evaluation)
            self._store_validation()
            self.checkpointer.flush()
        comm.barrier()  # what follows may read what the first process has written
        if self.preemption.should_save() and self.preemption.should_stop():
            self._exit_preempted()
        return evaluation

    def _exit_preempted(self) -> NoReturn:
        self.checkpointer.flush()
        comm.barrier()
        log.info("ended by SIGTERM, saved at step %d; resume=true goes on", self.progress.step)
        raise SystemExit(SIGTERM_EXIT_CODE)


def all_reduce_scalars(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each number over the processes, each of which saw as many images."""
    means = comm.all_reduce_mean(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()
    return dict(zip(values, means, strict=True))
