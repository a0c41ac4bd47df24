"""Writes checkpoints beside the training, and says what becomes of them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from omegaconf import DictConfig

from vqf.errors import UserError
from vqf.pipelines import checkpoint as checkpoints
from vqf.pipelines.retention import Best
from vqf.pipelines.training import Snapshot
from vqf.terminal import log


class Saver:
    """Writes one snapshot at a time, in a thread of its own.

    A step never waits for the disk. A snapshot that comes while another is being written waits for its turn; if a
    newer one comes meanwhile it is passed over, unless it is the best so far, so that no more than two are held in
    memory. What goes wrong in the thread is answered at the next step, as checkpoint.on_failure says.

    Args:
        run_dir: The run's folder.
        config: The words of `checkpoint`.
        best: Which checkpoint is kept beside the newest.
        before: Called in the thread before each is written.
    """

    def __init__(self, run_dir: Path, config: DictConfig, best: Best | None, before: Callable[[], None]) -> None:
        self.run_dir, self.config, self.best, self.before = run_dir, config, best, before
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
        elif self.waiting is None:
            self.waiting = snapshot
        else:
            passed, self.waiting = sorted([self.waiting, snapshot], key=self._is_best)  # of equals the newer stays
            log.warning("step %d is not saved: the disk is slower than checkpoint.every", _step(passed))
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
            line = self._words(snapshot, error)
            if self.config.on_failure == "stop":
                raise UserError(f"{line}. Make room, and go on with resume=true") from error
            log.warning("%s; going on, the next one is tried as usual", line)

    def settle(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: If something could not be, and the run is to stop.
        """
        while self.writing is not None:
            self.writing[1].exception()
            self.check()

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
            raise UserError(f"{self._words(self.lost, error)}. Make room, and go on with resume=true") from error
        self.lost = None

    def close(self) -> None:
        """Wait for the thread; what has not begun is not written any more."""
        self.waiting = None
        self.thread.shutdown(wait=True)

    def _is_best(self, snapshot: Snapshot) -> bool:
        return self.best is not None and self.best.score(snapshot.state) == snapshot.state["best"]

    def _begin(self, snapshot: Snapshot) -> None:
        self.writing = snapshot, self.thread.submit(self._write, snapshot)

    def _write(self, snapshot: Snapshot) -> Path:
        self.before()
        return checkpoints.save(
            self.run_dir,
            state=snapshot.state,
            config=snapshot.config,
            weights=snapshot.weights,
            optimizers=snapshot.optimizers,
            keep=self.config.keep,
            best=self.best,
        )

    def _words(self, snapshot: Snapshot, error: OSError) -> str:
        folder = self.run_dir / checkpoints.FOLDER
        kept = max((path.name for path in folder.glob("step-*")), default=None)
        return (
            f"the checkpoint of step {_step(snapshot)} cannot be written to {folder}: {error.strerror or error}; "
            + (f"{kept} is kept" if kept else "there is no earlier one")
        )


def _step(snapshot: Snapshot) -> int:
    return snapshot.state["step"]
