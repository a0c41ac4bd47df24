"""The page of a run, made of whatever it has on disk: of one that goes on or was killed, too."""

from pathlib import Path

from omegaconf import DictConfig

from vqf.config.untrusted import check_symlinks
from vqf.errors import UserError
from vqf.registry import build, register
from vqf.runs.checkpoint import run_dir_of

REPORT_FILE = "report.html"
RUN_FILES = ("metrics.jsonl", "metrics.json", ".hydra")  # of a run


@register("pipeline", "report")
class Report:
    """Write `report.html` into the folder of a run, finished or not, from what is there."""

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config = config

    def run(self) -> None:
        """Write the page.

        Raises:
            UserError: If no run is named, or its folder holds none, or has a link out of it.
        """
        if self.config.run is None:
            raise UserError("run: give run=FOLDER, the run that the page is of")
        folder = run_dir_of(Path(self.config.run).expanduser())
        if not any(any(folder.rglob(each)) for each in RUN_FILES):
            raise UserError(f"run={self.config.run}: no run of vqf; there is no {' and no '.join(RUN_FILES)} in it")
        check_symlinks(folder)
        write_page(folder, self.config)


def write_page(folder: Path, config: DictConfig) -> None:
    """Write the page of a run; one that fails is reported."""
    build("logger", {"name": "report"}, run_dir=folder, config=config, subrun="").close()


def refresh_page(folder: Path, config: DictConfig) -> None:
    """Write the page of a run anew if it has one, and that of the run it is a stage of."""
    for each in (folder, folder.parent):
        if (each / REPORT_FILE).is_file():
            try:
                check_symlinks(each)
            except UserError:  # its numbers are not kept there either, and that was said
                continue
            write_page(each, config)
