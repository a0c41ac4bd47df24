"""`report.html`, the report of a run."""

import importlib.metadata
import importlib.resources
import logging
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vqf.atomic import atomic_write_text
from vqf.loggers.report.codebook import codebook_section, confusion_rows
from vqf.loggers.report.curves import plot_curves
from vqf.loggers.report.galleries import read_galleries
from vqf.loggers.report.run_parts import RunPart, checkpoint_curves, command, read_parts
from vqf.loggers.report.summary import cost_line, description, facts, load_config, title
from vqf.loggers.report.tables import class_accuracy_sentence, highlights, read_tables
from vqf.registry import register
from vqf.run_files.aside import make_way
from vqf.run_files.records import read_record, read_text
from vqf.run_files.shapes import SUMMARY
from vqf.terminal import printable_value

REPORT_FILE = "report.html"
PACKAGES = ("vqf", "torch", "hydra-core", "timm")
MAX_CURVES = 6  # of a stage; the others are folded away
FIRST_PAGE_SECONDS = 60.0  # before the first page of a run in progress
WRITE_INTERVAL_FACTOR = 50  # the pause after a page, in multiples of the time to write it


@register("logger", "report")
class ReportLogger:
    """Writes `report.html` into the run's folder when the run ends, and after validations while it is in progress.

    Writing pages takes at most a fiftieth of the training time.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.has_new_images, self.next_write = False, time.monotonic() + FIRST_PAGE_SECONDS

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write a page if there are new images, and enough time has passed."""
        began = time.monotonic()
        if self.has_new_images and began >= self.next_write:
            self.has_new_images = False
            self._write(logging.DEBUG)
            self.next_write = time.monotonic() + WRITE_INTERVAL_FACTOR * (time.monotonic() - began)

    def images(self, step: int, name: str, images: Tensor) -> None:
        self.has_new_images = True

    def close(self) -> None:
        """Write the page; errors are logged."""
        self._write(logging.INFO)

    def _write(self, level: int) -> None:
        log = logging.getLogger("vqf")
        try:
            log.log(level, "wrote %s", write_report(self.run_dir))
        except OSError as error:  # such as a full disk
            log.warning("%s cannot be written: %s", self.run_dir / REPORT_FILE, error.strerror or error)
        except Exception:
            log.warning("the report could not be written", exc_info=True)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from the files that a run has."""
    from jinja2 import Environment, StrictUndefined

    source = (importlib.resources.files("vqf.loggers.report") / "page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, finalize=printable_value, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(source)
    page = template.render(page_context(run_dir))
    path = run_dir / REPORT_FILE
    make_way(path)
    atomic_write_text(path, page)
    return path


def page_context(run_dir: Path) -> dict[str, Any]:
    """Gather the values that the template uses."""
    parts, summary = read_parts(run_dir), read_record(run_dir / "summary.json", SUMMARY)
    # After a resume, the summary counts the last process only; metrics.jsonl has the times of all.
    seconds = max(summary.get("wall_seconds", 0), sum(part.seconds for part in parts))
    config, (heading, subtitle) = load_config(run_dir), title(run_dir)
    tables = read_tables(run_dir, parts)
    curves = [(part.heading, *_draw_curves(part)) for part in (*parts, *checkpoint_curves(run_dir))]
    details = {key: value for part in parts for key, value in part.details.items()}
    return {
        "title": heading,
        "subtitle": subtitle,
        "description": description(config),
        "cost": cost_line(summary, seconds),
        "finished": bool(summary),
        "highlights": highlights(tables),
        "galleries": read_galleries(run_dir, parts),
        "codebook": codebook_section([*parts, RunPart(run_dir)]),
        "confusion": confusion_rows(details),
        "class_accuracy": class_accuracy_sentence(tables),
        "tables": tables,
        "curves": [(heading, first, others) for heading, first, others in curves if first],
        "facts": facts(config, summary, seconds),
        "command": command(run_dir, summary),
        "config": read_text(run_dir / ".hydra" / "config.yaml"),
        "versions": summary.get("versions") or package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the main packages."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _draw_curves(part: RunPart) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    series = {key: part.series(key) for key in part.keys}
    keys = [key for key, curves in series.items() if max(map(len, curves.values())) > 1]
    first = [key for key in keys if not _is_variant(key, keys)][:MAX_CURVES]
    svgs = {key: plot_curves(series[key]) for key in keys}
    return [(key, svgs[key]) for key in first], [(key, svgs[key]) for key in keys if key not in first]


def _is_variant(key: str, keys: Iterable[str]) -> bool:
    return key.startswith("lr/") or any(key.startswith(f"{other}_") for other in keys)
