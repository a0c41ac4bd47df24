"""Compare runs: one table, and one page of the same held-out images through every one of them."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from vqf.distributed.engine import Engine, make_engine
from vqf.errors import UserError
from vqf.pipelines.comparison.ranking import rank
from vqf.pipelines.comparison.reconstructions import reconstruct_runs
from vqf.pipelines.comparison.report import ComparisonReport
from vqf.pipelines.comparison.runs import TRAINING_PIPELINES, find_runs, read_runs
from vqf.registry import register
from vqf.runs.provenance import command_line
from vqf.terminal import log

DEFAULT_COUNT = 8  # images of every run


@register("pipeline", "compare")
class Compare:
    """Put runs into one table, best first, and their reconstructions of the same held-out images onto one page.

    Writes `comparison.md`, `comparison.csv` and `comparison.html`. Numbers of two protocols never share a column.

    Args:
        runs: Folders of runs, or a folder of them, such as a sweep's; checkpoints of runs, too.
        sort: A metric, `protocol/metric` where two protocols measured it, or `name`, `step`, `seconds`,
            `processor_seconds`, `parameters`. Best first; a minus in front turns it round.
        count: Images of every run.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        runs: str | Sequence[str],
        sort: str | None = None,
        count: int = DEFAULT_COUNT,
    ) -> None:
        self.config, self.run_dir, self.runs, self.sort, self.count = config, run_dir, runs, sort, count
        if count < 1:
            raise UserError(f"count={count}: a comparison shows at least one image")

    def run(self) -> None:
        """Write the files and print the table."""
        comparison = compare(find_runs(self.runs), self.sort, self.count, make_engine(self.config), [command_line()])
        page = comparison.write(self.run_dir)
        comparison.print_table()
        log.info("%s", page)


def compare(
    paths: Sequence[Path], sort: str | None, count: int, engine: Engine, commands: Sequence[str]
) -> ComparisonReport:
    """Read runs, reconstruct images by each, and put them into one table.

    Raises:
        UserError: If none of them has anything to compare, or if `sort` names no column, or one of two protocols.
    """
    runs = read_runs(paths)
    kept = [run for run in runs if run.checkpoints or run.metrics]
    lost = [run for run in runs if run not in kept]
    if not kept:
        why = "; ".join(f"{run.name}: {run.status}" for run in lost)
        raise UserError(f"runs: nothing to compare yet ({why})")
    rank(kept, [None] * len(kept), sort)  # a slip shows before the images are drawn
    album = reconstruct_runs(kept, count, engine)
    return ComparisonReport(rank(kept, album.parameters, sort), album, lost, commands)


class SweepTable(Callback):
    """Writes one table over the runs of a sweep into its folder when it ends."""

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        """Compare what the sweep has trained; a table that fails is reported, no more: the runs are finished."""
        if config.pipeline.name not in TRAINING_PIPELINES:
            return
        folder = Path(config.hydra.sweep.dir)
        commands = [command_line(), shlex.join(["python", "-m", "vqf.run", "pipeline=compare", f"runs={folder}"])]
        try:
            paths = find_runs(str(folder))
            if len(paths) > 1:
                comparison = compare(paths, None, DEFAULT_COUNT, make_engine(config), commands)
                page = comparison.write(folder)
                comparison.print_table()
                log.info("%s", page)
        except UserError as error:
            log.warning("no table of this sweep: %s", error)
        except Exception:
            log.warning("the table of this sweep could not be written", exc_info=True)
