"""A plugin for tests of several processes: a pipeline that each of them runs, and does as it is told."""

from pathlib import Path

from omegaconf import DictConfig

from vqf import register
from vqf.distributed import comm
from vqf.errors import UserError
from vqf.terminal import log


@register("pipeline", "ranks")
class RankPipeline:
    """Agree on the folder, then do as told in some of the processes."""

    distributed = True

    def __init__(self, config: DictConfig, run_dir: Path, *, do: str = "nothing", who: str = "01") -> None:
        self.run_dir, self.do, self.who = run_dir, do, who

    def run(self) -> float:
        """Return 0."""
        log.info("running in %s", self.run_dir.name)
        assert comm.broadcast_object(self.run_dir) == self.run_dir
        if str(comm.rank()) in self.who:
            if self.do == "warn":
                log.warning("a warning")
            if self.do == "refuse":
                raise UserError(f"process {comm.rank()} refuses")
            if self.do == "break":
                raise IndexError(f"a bug in process {comm.rank()}")
        comm.barrier()
        return 0.0
