"""The report of a run: one page that holds everything and needs nothing, for a browser, a printer or a mail."""

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
from vqf.loggers.report.curves import curve
from vqf.loggers.report.galleries import read_galleries
from vqf.loggers.report.run_files import RunPart, checkpoint_curves, command, read_json, read_parts, read_text
from vqf.loggers.report.summary import cost_line, description, facts, load_config, title
from vqf.loggers.report.tables import class_accuracy_sentence, highlights, read_tables
from vqf.registry import register

PACKAGES = ("vqf", "torch", "hydra-core", "timm")
MAX_CURVES = 6  # of a stage that are shown at once; the others unfold
FIRST_PAGE_SECONDS = 60.0  # seconds before a run that goes on has a page
WRITE_INTERVAL_FACTOR = 50  # times as long as a page took to write, before the next one


@register("logger", "report")
class ReportLogger:
    """Writes `report.html` into the run's folder when the run ends, and after looks at held-out data meanwhile.

    Meanwhile only so often that it takes no more than a fiftieth of the time.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.has_new_images, self.next_write = False, time.monotonic() + FIRST_PAGE_SECONDS

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Read from disk; what was measured at a look is there when the numbers after it come."""
        began = time.monotonic()
        if self.has_new_images and began >= self.next_write:
            self.has_new_images = False
            self._write(logging.DEBUG)
            self.next_write = time.monotonic() + WRITE_INTERVAL_FACTOR * (time.monotonic() - began)

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Read from disk."""
        self.has_new_images = True

    def close(self) -> None:
        """Write the page. A page that fails is reported, and takes no finished run down with it."""
        self._write(logging.INFO)

    def _write(self, level: int) -> None:
        log = logging.getLogger("vqf")
        try:
            log.log(level, "wrote %s", write_report(self.run_dir))
        except Exception:
            log.warning("the report could not be written", exc_info=True)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from whatever a run has on disk: numbers, images, config, command."""
    from jinja2 import Environment, StrictUndefined

    source = (importlib.resources.files("vqf.loggers.report") / "page.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(source)
    page = template.render(page_context(run_dir))
    path = run_dir / "report.html"
    atomic_write_text(path, page)
    return path


def page_context(run_dir: Path) -> dict[str, Any]:
    """Gather what the page shows."""
    found, summary = read_parts(run_dir), read_json(run_dir / "summary.json")
    # A run in several processes, one after the other, knows the time of the last; its records know that of all.
    seconds = max(summary.get("wall_seconds") or 0, sum(part.seconds for part in found))
    config, (heading, place) = load_config(run_dir), title(run_dir)
    shown = read_tables(run_dir, found)
    curves = [(part.heading, *_draw_curves(part)) for part in (*found, *checkpoint_curves(run_dir))]
    details = {key: value for part in found for key, value in read_json(part.folder / "details.json").items()}
    return {
        "title": heading,
        "parent": place,
        "description": description(config),
        "cost": cost_line(summary, seconds),
        "finished": bool(summary),
        "highlights": highlights(shown),
        "galleries": read_galleries(run_dir, found),
        "codebook": codebook_section([*found, RunPart(run_dir, "", {}, {}, 0.0)]),
        "confusion": confusion_rows(details),
        "class_accuracy": class_accuracy_sentence(shown),
        "tables": shown,
        "curves": [(heading, drawn, others) for heading, drawn, others in curves if drawn],
        "facts": facts(config, summary, seconds),
        "command": command(run_dir, summary),
        "config": read_text(run_dir / ".hydra" / "config.yaml"),
        "versions": summary.get("versions") or package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of what a run rests on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _draw_curves(part: RunPart) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Draw every key that was measured more than once: those that matter most, and the others."""
    series = {key: part.series(key) for key in part.keys}
    every = [key for key, each in series.items() if max(map(len, each.values())) > 1]
    shown = [key for key in every if not _is_variant(key, every)][:MAX_CURVES]
    drawn = {key: curve(series[key]) for key in every}
    return [(key, drawn[key]) for key in shown], [(key, drawn[key]) for key in every if key not in shown]


def _is_variant(key: str, keys: Iterable[str]) -> bool:
    """Tell whether a key is another view of one that is there, as psnr_pooled is of psnr."""
    return key.startswith("lr/") or any(key.startswith(f"{each}_") for each in keys)
