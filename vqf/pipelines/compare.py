"""Compare the metrics and reconstructions of runs."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from vqf.distributed.engine import Engine, make_engine
from vqf.errors import UserError
from vqf.options.ranges import PositiveInt
from vqf.pipelines.comparison.ranking import rank
from vqf.pipelines.comparison.reconstructions import reconstruct_runs
from vqf.pipelines.comparison.report import ComparisonReport
from vqf.pipelines.comparison.runs import TRAINING_PIPELINES, find_runs, read_runs
from vqf.registry import register
from vqf.runs.provenance import command_line
from vqf.terminal import log

DEFAULT_COUNT = 8  # reconstructions per run


@register("pipeline", "compare")
class Compare:
    """Compare runs in one table, best first, and on one page of their reconstructions of the same validation images.

    Metrics of different protocols get columns of their own.

    Args:
        runs: Folders or checkpoints of runs, or a folder that holds runs, such as a sweep's.
        sort: Column to sort by, best first: a metric, `protocol/metric` if two protocols measured it, or `name`,
            `step`, `seconds`, `processor_seconds`, `parameters`. A leading minus reverses the order.
        count: Images per run.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        runs: str | Sequence[str],
        sort: str | None = None,
        count: PositiveInt = DEFAULT_COUNT,
    ) -> None:
        self.config, self.run_dir, self.runs, self.sort, self.count = config, run_dir, runs, sort, count

    def run(self) -> None:
        comparison = compare(find_runs(self.runs), self.sort, self.count, make_engine(self.config), [command_line()])
        page = comparison.write(self.run_dir)
        comparison.print_table()
        log.info("%s", page)


def compare(
    paths: Sequence[Path], sort: str | None, count: int, engine: Engine, commands: Sequence[str]
) -> ComparisonReport:
    """Read the runs, reconstruct validation images with each, and rank them.

    Raises:
        UserError: If no run has a checkpoint or metrics, or `sort` is no column or ambiguous.
    """
    runs = read_runs(paths)
    comparable = [run for run in runs if run.checkpoints or run.metrics]
    empty = [run for run in runs if run not in comparable]
    if not comparable:
        reasons = "; ".join(f"{run.name}: {run.status}" for run in empty)
        raise UserError(f"runs: nothing to compare yet ({reasons})")
    rank(comparable, [None] * len(comparable), sort)  # a wrong `sort` must show before the images are reconstructed
    panels = reconstruct_runs(comparable, count, engine)
    return ComparisonReport(rank(comparable, panels.parameters, sort), panels, empty, commands)


class SweepTable(Callback):
    """Hydra callback that compares the runs of a finished sweep; a failure is only logged."""

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
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
            log.warning("sweep not compared: %s", error)
        except Exception:
            log.warning("sweep not compared", exc_info=True)
