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
from vqf.runs.retention import Best
from vqf.runs.snapshot import Snapshot
from vqf.terminal import log

CURE = "Make room, and go on with resume=true"


class Saver:
    """Writes one snapshot at a time, in a thread of its own.

    A step never waits for the disk. A snapshot that comes while another is being written waits for its turn; if a
    newer one comes meanwhile it is passed over, so that no more than two are held in memory. What goes wrong in the
    thread is answered at the next step, as checkpoint.on_failure says.

    Args:
        run_dir: The run's folder.
        config: The words of `checkpoint`.
        best: Which checkpoint is kept beside the newest.
        before: Called in the thread before each is written.
        every: The newest checkpoint at a multiple of this is kept, too.
    """

    def __init__(
        self,
        run_dir: Path,
        config: DictConfig,
        best: Best | None,
        before: Callable[[], None],
        every: int | None = None,
    ) -> None:
        self.run_dir, self.config, self.before = run_dir, config, before
        self.retention: dict[str, Any] = {"keep": config.keep, "best": best, "every": every}
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: tuple[Snapshot, Future[Path]] | None = None
        self.waiting: Snapshot | None = None
        self.lost: Snapshot | None = None  # the last one that could not be written

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a snapshot, or have it wait for its turn.

        Raises:
            UserError: If an earlier one could not be written and the run is to stop.
        """
        self.check()
        if self.writing is None:
            self._begin(snapshot)
        else:
            if self.waiting is not None:
                step = _step(self.waiting)
                log.warning("step %d is not saved: the disk is slower than checkpoint.every", step)
            self.waiting = snapshot
        if not self.config.background:
            self.settle()

    def check(self) -> None:
        """Answer what has become of the last snapshot, if it is known, and begin with the next.

        Raises:
            UserError: If it could not be written and the run is to stop.
        """
        if self.writing is None or not self.writing[1].done():
            return
        (snapshot, future), self.writing = self.writing, None
        following, self.waiting = self.waiting, None
        if following is not None:
            self._begin(following)
        try:
            log.info("saved %s", future.result())
            self.lost = None
        except OSError as error:
            self.lost = snapshot
            self._answer(_step(snapshot), error)

    def settle(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: If something could not be, and the run is to stop.
        """
        while self.writing is not None:
            self.writing[1].exception()
            self.check()

    def amend(self, state: Mapping[str, Any]) -> None:
        """Wait for the checkpoint of a step, and give it another state: what a look has found.

        Raises:
            UserError: If something could not be written and the run is to stop.
        """
        self.settle()
        if self.lost is not None and _step(self.lost) == state["step"]:
            self.lost = replace(self.lost, state=state)
            return
        try:
            checkpoint_writer.amend(self.run_dir, state, **self.retention)
        except OSError as error:
            self._answer(state["step"], error)

    def finish(self) -> None:
        """Wait until the last snapshot is written, which is tried once more if it could not be.

        Raises:
            UserError: If it still cannot: the run has nothing to show for its last steps.
        """
        self.settle()
        if self.lost is None:
            return
        try:
            log.info("saved %s", self._write(self.lost))
        except OSError as error:
            raise UserError(f"{self._words(_step(self.lost), error)}. {CURE}") from error
        self.lost = None

    def close(self) -> None:
        """Wait for the thread; what has not begun is not written any more."""
        self.waiting = None
        self.thread.shutdown(wait=True)

    def _begin(self, snapshot: Snapshot) -> None:
        self.writing = snapshot, self.thread.submit(self._write, snapshot)

    def _write(self, snapshot: Snapshot) -> Path:
        self.before()
        return checkpoint_writer.save(
            self.run_dir,
            state=snapshot.state,
            config=snapshot.config,
            weights=snapshot.weights,
            optimizers=snapshot.optimizers,
            **self.retention,
        )

    def _answer(self, step: int, error: OSError) -> None:
        line = self._words(step, error)
        if self.config.on_failure == "stop":
            raise UserError(f"{line}. {CURE}") from error
        log.warning("%s; going on, the next one is tried as usual", line)

    def _words(self, step: int, error: OSError) -> str:
        folder = self.run_dir / checkpoints.FOLDER
        kept = max((path.name for path in folder.glob("step-*")), default=None)
        return f"the checkpoint of step {step} cannot be written to {folder}: {error.strerror or error}; " + (
            f"{kept} is kept" if kept else "there is no earlier one"
        )


def _step(snapshot: Snapshot) -> int:
    return snapshot.state["step"]
