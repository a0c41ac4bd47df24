"""The training loop: step, log, save, validate, roll back, finish."""

import math
import signal
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.batch import Batch
from vqf.distributed import comm
from vqf.distributed.engine import Engine, seed_everything
from vqf.distributed.threads import cpu_threads
from vqf.errors import UserError
from vqf.evaluation.validation import ValidationResult
from vqf.protocols import VALIDATION_PREFIX
from vqf.runs import checkpoint as checkpoints
from vqf.runs import checkpoint_writer
from vqf.runs.async_checkpointer import AsyncCheckpointer
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.resume import check_same_run, find_on_main, find_start_checkpoint
from vqf.runs.retention import parse_best_criterion
from vqf.runs.run_logger import RunLogger, start_run
from vqf.terminal import log
from vqf.training.alarms import AlarmMonitor, build_alarms
from vqf.training.nonfinite import NonFiniteEvent, NonFiniteGuard
from vqf.training.out_of_memory import explain_oom
from vqf.training.preemption import SIGNAL_EXIT_CODE, PreemptionSignals
from vqf.training.task import BatchSource, TrainingTask
from vqf.training.train_state import Progress, TrainState

MAX_BAR_METRICS = 4  # scalars shown beside the progress bar


def train(
    task: TrainingTask, config: DictConfig, run_dir: Path, engine: Engine, batch_source: BatchSource, subrun: str = ""
) -> ValidationResult:
    """Train a task and return its final validation.

    Args:
        batch_source: Yields the batches of a range of batch numbers.
        subrun: Name of this run inside a longer one.

    Raises:
        UserError: If the checkpoint to resume is of another run, whose folder is left unchanged.
        SystemExit: After SIGTERM or SIGHUP, once a checkpoint is saved.
    """
    trainer = Trainer(task, config, run_dir, engine)
    trainer.resume()  # before the loggers open: a refused run writes nothing
    with start_run(config, run_dir, subrun=subrun) as run_logger:
        return trainer.run(batch_source, run_logger)


class Trainer:
    """Takes `config.steps` optimizer steps of a task."""

    run_logger: RunLogger
    checkpointer: AsyncCheckpointer

    def __init__(self, task: TrainingTask, config: DictConfig, run_dir: Path, engine: Engine) -> None:
        self.task, self.config, self.run_dir, self.engine = task, config, run_dir, engine
        self.train_state = TrainState(task, config, engine)
        self.progress = Progress()
        self.nonfinite_guard = NonFiniteGuard(task.kind, config.nonfinite)
        self.alarm_monitor = AlarmMonitor(build_alarms(config.model))
        self.preemption = PreemptionSignals()
        self.best_criterion = parse_best_criterion(config.checkpoint.best, task.higher_is_better)
        self.rollback_enabled = self.nonfinite_guard.action == "rollback"
        self.resumed_from: Checkpoint | None = None

    def resume(self) -> None:
        """Load the checkpoint to resume, if any.

        Raises:
            UserError: If it is of another run.
        """
        self.resumed_from = find_start_checkpoint(self.config, self.run_dir, self.task.kind)
        if self.resumed_from is not None:
            check_same_run(self.resumed_from, self.config, self.task.metadata)
            self._restore(self.resumed_from)
            if isinstance(threads := self.resumed_from.state.get("threads"), int):
                cpu_threads.resume(threads)

    def run(self, batch_source: BatchSource, run_logger: RunLogger) -> ValidationResult:
        # Rollbacks use checkpoints at multiples of checkpoint.every only, so the newest of these is never pruned.
        every = self.config.checkpoint.every if self.rollback_enabled else None
        self.run_logger = run_logger
        self.checkpointer = AsyncCheckpointer(
            self.run_dir, self.config.checkpoint, self.best_criterion, before_write=run_logger.sync, every=every
        )
        with closing(self.checkpointer), self.preemption:
            # Resume: `resume` has loaded the checkpoint; here the folder is brought to the same step.
            self._discard_later()
            # Rollback needs a checkpoint at step 0. A pending validation needs one in this folder to store its result
            # in, which a run resumed from another folder does not have yet.
            needs_target = self.progress.validation_due and not self._resumes_in_place()
            if needs_target or (self.rollback_enabled and self.resumed_from is None):
                self._save(self.progress.validation_due)

            # Train.
            with terminal.progress(self.task.kind, self.config.steps, self.progress.step) as bar:
                while self.progress.step < self.config.steps:  # once, and once more after each rollback
                    self._train_until_rollback(batch_source, bar)

            # Finish: save and validate the final weights.
            return self._finish()

    def _train_until_rollback(self, batch_source: BatchSource, bar: terminal.ProgressBar) -> None:
        # The process that saved this checkpoint ended before its validation was done.
        if self.progress.validation_due:
            self._validate()

        # Batch numbers run ahead of steps by the batches that rollbacks have skipped.
        skipped = self.progress.skipped_batches
        source = batch_source(self.progress.step + skipped, self.config.steps + skipped)
        with closing(source) as batches:
            for batch in batches:
                # Step: forward, backward, optimizers, schedules, EMA.
                scalars = self._train_step(batch)
                bar.advance()

                # What is due now. The last step is saved and validated by `_finish`.
                done, config = self.progress.step, self.config
                is_last = done == config.steps
                save_requested = self.preemption.should_save()  # a collective: every rank asks at every step
                log_due = is_last or done % config.log.every == 0
                validation_due = not is_last and done % config.evaluate.every == 0
                save_due = save_requested or validation_due or (not is_last and done % config.checkpoint.every == 0)

                # Log.
                if log_due:
                    logged = self._log_train_step(scalars)
                    bar.advance(0, terminal.format_metrics(dict(list(logged.items())[:MAX_BAR_METRICS])))

                # Roll back. This comes before saving, so that no checkpoint holds non-finite weights.
                event = self._poll_nonfinite(log_due or save_due)
                if event is None and (save_due or is_last):
                    event = self.nonfinite_guard.check_state(done, self.train_state.nonfinite_names())
                if event:
                    bar.advance(-self._rollback(event))
                    return

                # Save. This comes before validation: a process killed while it validates loses no step.
                self.checkpointer.check()
                stop_signal = self.preemption.stop_signal() if save_requested else None
                if stop_signal or validation_due:
                    self.checkpointer.wait()  # a snapshot queued behind a slow disk can be dropped; this one must not
                if save_due:
                    self._save(validation_due)
                if stop_signal:
                    self._exit_preempted(stop_signal)

                # Validate.
                if validation_due:
                    self._validate()

    def _train_step(self, batch: Batch) -> dict[str, Tensor]:
        progress, kind = self.progress, self.task.kind
        # Noise depends on seed and batch number alone, so a resumed run draws the same without a saved RNG state.
        seed_everything(self.config.seed, kind, progress.step + progress.skipped_batches)
        with cpu_threads.watch(kind), explain_oom(f"{kind}, step {progress.step + 1}", kind, self.config):
            scalars = self.task.step(progress.step, batch.to(self.engine.device))
        self.nonfinite_guard.update(progress.step, scalars)
        self.train_state.after_step(progress.step)
        progress.step += 1
        return scalars

    def _log_train_step(self, scalars: Mapping[str, Tensor]) -> dict[str, float]:
        means = comm.all_reduce_scalars({key: float(value) for key, value in scalars.items()})
        self._log_scalars(means | self.train_state.learning_rates())
        return means

    def _log_scalars(self, values: Mapping[str, float]) -> None:
        self.run_logger.scalars(self.progress.step, values)
        self.progress.last_logged = self.progress.step
        if comm.is_main():
            self.alarm_monitor.check(self.progress.step, values)

    def _poll_nonfinite(self, needed: bool) -> NonFiniteEvent | None:
        """Read the guard's record if free or `needed`: on a GPU the host waits."""
        stepped = all(optimizer_step.stepped for optimizer_step in self.task.optimizer_steps.values())
        if needed or self.nonfinite_guard.action == "skip" or self.engine.device.type == "cpu":
            return self.nonfinite_guard.poll(stepped)
        return None

    def _save(self, validation_due: bool = False) -> None:
        self.progress.validation_due = validation_due
        if (snapshot := self.train_state.snapshot(self._state())) is not None:
            self.checkpointer.save(snapshot)
        if self.progress.step % self.config.checkpoint.every == 0:
            self.nonfinite_guard.checkpoint_saved()

    def _state(self) -> dict[str, Any]:
        state = {"kind": self.task.kind, "seed": self.config.seed, **self.task.metadata, **asdict(self.progress)}
        state |= {"nonfinite": self.nonfinite_guard.state_dict(), "alarms": self.alarm_monitor.state_dict()}
        return {**state, "threads": torch.get_num_threads()}

    def _validate(self) -> None:
        self._log_validation(self._evaluate())
        self._store_validation()
        # A scheduler may kill the job soon after SIGTERM, so do not take another step first.
        if self.preemption.should_save() and (stop_signal := self.preemption.stop_signal()):
            self._exit_preempted(stop_signal)

    def _evaluate(self, final: bool = False) -> ValidationResult:
        if self.config.workers:
            self.checkpointer.wait()  # data workers fork now: a fork beside a writing thread may inherit a held lock
        model = self.task.model
        model.eval()
        seed_everything(self.config.seed, "evaluate")
        averaged = self.train_state.ema.average_parameters() if self.train_state.ema else nullcontext()
        where = f"{self.task.kind}, validation"
        with torch.no_grad(), averaged, self.engine.unsharded(model), explain_oom(where, self.task.kind, self.config):
            result = self.task.evaluate(model)
            if final:
                result = result.merge(self.task.final_validation(model))
        model.train()
        return result

    def _log_validation(self, result: ValidationResult) -> None:
        progress = self.progress
        self._log_scalars({f"{VALIDATION_PREFIX}{key}": value for key, value in result.scalars.items()})
        for name, images in result.images.items():
            self.run_logger.images(progress.step, name, images)
        self.run_logger.write_details(result.details)
        progress.last_validation = {"step": progress.step, "values": result.scalars}
        score = self.best_criterion.score(asdict(progress)) if self.best_criterion else -math.inf
        if score > (-math.inf if progress.best is None else progress.best):
            progress.best = score

    def _store_validation(self) -> None:
        self.progress.validation_due = False
        if comm.is_main():
            self.checkpointer.update_state(self._state())

    def _rollback(self, event: NonFiniteEvent) -> int:
        """Restore the newest checkpoint and skip all batches up to the event's; returns the steps undone.

        PaLM, https://arxiv.org/abs/2204.02311, section 5.1. Only multiples of checkpoint.every count: it is repeatable.

        Raises:
            UserError: If there is no checkpoint.
        """
        self.checkpointer.wait()
        before, every = self.progress, self.config.checkpoint.every
        checkpoint = find_on_main(lambda: checkpoints.latest_checkpoint(self.run_dir, every))
        if checkpoint is None:
            raise UserError(f"{self.task.kind}, step {event.step + 1}: {event.message}; no checkpoint to roll back to")
        self.resumed_from = checkpoint
        self._restore(checkpoint)
        self._discard_later()
        # The number of the next batch, step + skipped_batches, is one more than that of the event's batch.
        self.progress.skipped_batches = event.step + before.skipped_batches + 1 - checkpoint.step
        if comm.is_main():
            log.warning("rolled back to step %d; continuing with other batches", checkpoint.step)
        return before.step - checkpoint.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.train_state.restore(checkpoint)
        self.progress = Progress.from_state(checkpoint.state)
        try:
            self.nonfinite_guard.load_state_dict(checkpoint.state.get("nonfinite", {}))
            self.alarm_monitor.load_state_dict(checkpoint.state.get("alarms", {}))
        except (TypeError, AttributeError, ValueError) as error:  # state.json may hold anything
            raise UserError(f"resume: {checkpoint.path}: state.json has no valid nonfinite and alarms") from error
        comm.barrier()  # no rank may change the folder before all have read it

    def _resumes_in_place(self) -> bool:
        if self.resumed_from is None:
            return False
        return checkpoints.run_dir_of(self.resumed_from.path).resolve() == self.run_dir.resolve()

    def _discard_later(self) -> None:
        step = self.progress.step if self.resumed_from else -1
        if comm.is_main():
            checkpoint_writer.archive_later(self.run_dir, step)
        if not self._resumes_in_place():
            self.progress.last_logged = 0  # in the log of another folder
        self.run_logger.truncate_after(step, not self.progress.validation_due, self.progress.last_logged)
        if self.resumed_from:
            log.info("resuming from %s", self.resumed_from.path)

    def _finish(self) -> ValidationResult:
        last = self.progress.last_validation
        already_validated = last is not None and last["step"] == self.config.steps
        if not already_validated and not self.progress.validation_due:
            self.checkpointer.wait()
            self._save(validation_due=True)
        result = self._evaluate(final=True)  # always: a checkpoint keeps only its scalars
        if not already_validated:
            self._log_validation(result)
            self._store_validation()
            self.checkpointer.flush()
        comm.barrier()  # other ranks may read next what the main one has written
        if self.preemption.should_save() and (stop_signal := self.preemption.stop_signal()):
            self._exit_preempted(stop_signal)
        return result

    def _exit_preempted(self, stop_signal: signal.Signals) -> NoReturn:
        self.checkpointer.flush()
        comm.barrier()
        log.info("stopped by %s; saved at step %d, continue with resume=true", stop_signal.name, self.progress.step)
        raise SystemExit(SIGNAL_EXIT_CODE + stop_signal)
