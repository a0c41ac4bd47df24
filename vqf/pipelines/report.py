"""Write the HTML report of a run."""

from pathlib import Path

from omegaconf import DictConfig

from vqf.config.untrusted import check_symlinks
from vqf.errors import UserError
from vqf.registry import build, register
from vqf.runs.checkpoint import run_dir_of

REPORT_FILE = "report.html"
RUN_FILES = ("metrics.jsonl", "metrics.json", ".hydra")  # a folder without any of them is no run


@register("pipeline", "report")
class Report:
    """Write `report.html` into the folder of a run, finished or not."""

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config = config

    def run(self) -> None:
        """Write the page.

        Raises:
            UserError: If `run` is missing or no run's folder, or a symbolic link leaves it.
        """
        if self.config.run is None:
            raise UserError("run: give run=FOLDER, the run to report on")
        folder = run_dir_of(Path(self.config.run).expanduser())
        if not any(any(folder.rglob(name)) for name in RUN_FILES):
            raise UserError(f"run={self.config.run}: no run of vqf; it has no {' and no '.join(RUN_FILES)}")
        check_symlinks(folder)
        write_page(folder, self.config)


def write_page(folder: Path, config: DictConfig) -> None:
    """Write the page of a run; a failure is only logged."""
    build("logger", {"name": "report"}, run_dir=folder, config=config, subrun="").close()


def refresh_page(folder: Path, config: DictConfig) -> None:
    """Rewrite the page of a run, and of the run that it is a stage of."""
    for run_dir in (folder, folder.parent):
        if (run_dir / REPORT_FILE).is_file():
            try:
                check_symlinks(run_dir)
            except UserError:  # already logged when the metrics were not saved there either
                continue
            write_page(run_dir, config)
