"""`AsyncCheckpointer`: saves checkpoints in a thread while training continues."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vqf.errors import UserError
from vqf.runs import checkpoint_writer
from vqf.runs.checkpoint import CHECKPOINTS_FOLDER
from vqf.runs.retention import BestCriterion
from vqf.runs.snapshot import Snapshot
from vqf.terminal import log

HINT = "Free disk space and continue with resume=true"


class AsyncCheckpointer:
    """Writes one snapshot at a time in a background thread.

    A snapshot that arrives during a write is queued; a newer one replaces it, so at most two are held in memory. With
    `checkpoint.on_failure=stop` every method but `close` raises a UserError after a failed write.

    Args:
        before_write: Called in the thread before each write.
        every: The newest checkpoint at a multiple of this step is kept, too.
    """

    def __init__(
        self,
        run_dir: Path,
        config: DictConfig,
        best: BestCriterion | None,
        before_write: Callable[[], None],
        every: int | None = None,
    ) -> None:
        self.run_dir, self.config, self.before_write = run_dir, config, before_write
        self.retention: dict[str, Any] = {"keep": config.keep, "best": best, "every": every}
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.in_progress: tuple[Snapshot, Future[Path]] | None = None
        self.queued: Snapshot | None = None
        self.failed: Snapshot | None = None  # the last one that could not be written; `flush` retries it

    def save(self, snapshot: Snapshot) -> None:
        """Start writing a snapshot, or queue it."""
        self.check()
        if self.in_progress is None:
            self._submit(snapshot)
        else:
            if self.queued is not None:
                log.warning(
                    "step %d is not saved: the disk is slower than checkpoint.every; raise it", _step_of(self.queued)
                )
            self.queued = snapshot
        if not self.config.background:
            self.wait()

    def check(self) -> None:
        """Handle a finished write and start the queued one, without waiting."""
        if self.in_progress is None or not self.in_progress[1].done():
            return
        (snapshot, future), self.in_progress = self.in_progress, None
        following, self.queued = self.queued, None
        if following is not None:
            self._submit(following)
        try:
            log.info("saved %s", future.result())
            self.failed = None
        except OSError as error:
            self.failed = snapshot
            self._handle_error(_step_of(snapshot), error)

    def wait(self) -> None:
        while self.in_progress is not None:
            self.in_progress[1].exception()
            self.check()

    def update_state(self, state: Mapping[str, Any]) -> None:
        """Replace the state of the checkpoint of `state["step"]`."""
        self.wait()
        if self.failed is not None and _step_of(self.failed) == state["step"]:
            self.failed = replace(self.failed, state=state)
            return
        try:
            checkpoint_writer.update_state(self.run_dir, state, **self.retention)
        except OSError as error:
            self._handle_error(state["step"], error)

    def flush(self) -> None:
        """Wait until everything is written, and retry the last snapshot once.

        Raises:
            UserError: If it fails again.
        """
        self.wait()
        if self.failed is None:
            return
        try:
            log.info("saved %s", self._write(self.failed))
        except OSError as error:
            raise UserError(f"{self._error_message(_step_of(self.failed), error)}. {HINT}") from error
        self.failed = None

    def close(self) -> None:
        """Wait for the write in progress; drop the queued snapshot."""
        self.queued = None
        self.executor.shutdown(wait=True)

    def _submit(self, snapshot: Snapshot) -> None:
        self.in_progress = snapshot, self.executor.submit(self._write, snapshot)

    def _write(self, snapshot: Snapshot) -> Path:
        self.before_write()
        return checkpoint_writer.write_checkpoint(
            self.run_dir,
            state=snapshot.state,
            config=snapshot.config,
            weights=snapshot.weights,
            optimizers=snapshot.optimizers,
            **self.retention,
        )

    def _handle_error(self, step: int, error: OSError) -> None:
        message = self._error_message(step, error)
        if self.config.on_failure == "stop":
            raise UserError(f"{message}. {HINT}") from error
        log.warning("%s; training continues, the next checkpoint is tried as usual", message)

    def _error_message(self, step: int, error: OSError) -> str:
        folder = self.run_dir / CHECKPOINTS_FOLDER
        newest = max((path.name for path in folder.glob("step-*")), default=None)
        return f"the checkpoint of step {step} cannot be written to {folder}: {error.strerror or error}; " + (
            f"{newest} is kept" if newest else "there is no earlier one"
        )


def _step_of(snapshot: Snapshot) -> int:
    return snapshot.state["step"]
