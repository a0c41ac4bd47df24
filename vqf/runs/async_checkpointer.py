"""Writes checkpoints beside the training, and says what becomes of them."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vqf.errors import UserError
from vqf.runs import checkpoint as checkpoints
from vqf.runs import checkpoint_writer
from vqf.runs.retention import BestCriterion
from vqf.runs.snapshot import Snapshot
from vqf.terminal import log

HINT = "Make room, and go on with resume=true"


class AsyncCheckpointer:
    """Writes one snapshot at a time, in a thread of its own.

    A step never waits for the disk. A snapshot that comes while another is being written waits for its turn; if a
    newer one comes meanwhile it is passed over, so that no more than two are held in memory. What goes wrong in the
    thread is answered at the next step, as checkpoint.on_failure says.

    Args:
        run_dir: The run's folder.
        config: The words of `checkpoint`.
        best: Which checkpoint is kept beside the newest.
        before_write: Called in the thread before each is written.
        every: The newest checkpoint at a multiple of this is kept, too.
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
        self.failed: Snapshot | None = None  # the last one that could not be written

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a snapshot, or have it wait for its turn.

        Raises:
            UserError: If an earlier one could not be written and the run is to stop.
        """
        self.check()
        if self.in_progress is None:
            self._submit(snapshot)
        else:
            if self.queued is not None:
                step = _step_of(self.queued)
                log.warning("step %d is not saved: the disk is slower than checkpoint.every", step)
            self.queued = snapshot
        if not self.config.background:
            self.wait()

    def check(self) -> None:
        """Answer what has become of the last snapshot, if it is known, and begin with the next.

        Raises:
            UserError: If it could not be written and the run is to stop.
        """
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
        """Wait until everything is written.

        Raises:
            UserError: If something could not be, and the run is to stop.
        """
        while self.in_progress is not None:
            self.in_progress[1].exception()
            self.check()

    def update_state(self, state: Mapping[str, Any]) -> None:
        """Wait for the checkpoint of a step, and give it another state: what a look has found.

        Raises:
            UserError: If something could not be written and the run is to stop.
        """
        self.wait()
        if self.failed is not None and _step_of(self.failed) == state["step"]:
            self.failed = replace(self.failed, state=state)
            return
        try:
            checkpoint_writer.update_state(self.run_dir, state, **self.retention)
        except OSError as error:
            self._handle_error(state["step"], error)

    def flush(self) -> None:
        """Wait until the last snapshot is written, which is tried once more if it could not be.

        Raises:
            UserError: If it still cannot: the run has nothing to show for its last steps.
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
        """Wait for the thread; what has not begun is not written any more."""
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
        line = self._error_message(step, error)
        if self.config.on_failure == "stop":
            raise UserError(f"{line}. {HINT}") from error
        log.warning("%s; going on, the next one is tried as usual", line)

    def _error_message(self, step: int, error: OSError) -> str:
        folder = self.run_dir / checkpoints.CHECKPOINTS_FOLDER
        kept = max((path.name for path in folder.glob("step-*")), default=None)
        return f"the checkpoint of step {step} cannot be written to {folder}: {error.strerror or error}; " + (
            f"{kept} is kept" if kept else "there is no earlier one"
        )


def _step_of(snapshot: Snapshot) -> int:
    return snapshot.state["step"]
