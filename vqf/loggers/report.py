"""The report of a run: one page that holds everything and needs nothing, for a browser, a printer or a mail."""

import importlib.metadata
import importlib.resources
import logging
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vqf.loggers import about
from vqf.loggers.codebook import codebook, confusion
from vqf.loggers.curves import curve
from vqf.loggers.galleries import galleries
from vqf.loggers.meanings import HIGHLIGHTS, SHARES, meaning
from vqf.loggers.records import Part, command, parts, read_json, read_text
from vqf.registry import register

PACKAGES = ("vqf", "torch", "hydra-core", "timm")
CURVES = 6  # of a stage that are shown at once; the others unfold


@register("logger", "report")
class Report:
    """Writes `report.html` into the run's folder when the run ends."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Read from disk at the end."""

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Read from disk at the end."""

    def close(self) -> None:
        """Write the page. A page that fails is reported, and takes no finished run down with it."""
        log = logging.getLogger("vqf")
        try:
            log.info("wrote %s", write_report(self.run_dir))
        except Exception:
            log.warning("the report could not be written", exc_info=True)


@dataclass
class Row:
    """A number of a table."""

    name: str
    number: Any
    beside: str = ""  # its interval, and the same of real pictures

    @property
    def value(self) -> str:
        """The number as it is written."""
        return worded(self.name, self.number)

    @property
    def meaning(self) -> str:
        """What it says."""
        return meaning(self.name)


@dataclass
class Table:
    """Numbers that were measured together."""

    title: str
    rows: list[Row]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from whatever a run has on disk: numbers, pictures, config, command."""
    from jinja2 import Environment, StrictUndefined

    source = (importlib.resources.files("vqf.loggers") / "report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(source)
    page = template.render(collect(run_dir))
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def collect(run_dir: Path) -> dict[str, Any]:
    """Gather what the page shows."""
    found, summary = parts(run_dir), read_json(run_dir / "summary.json")
    # A run in several processes, one after the other, knows the time of the last; its records know that of all.
    seconds = max(summary.get("wall_seconds") or 0, sum(part.seconds for part in found))
    config, (title, place) = about.load_config(run_dir), about.title(run_dir)
    tables = _tables(run_dir, found)
    details = {key: value for part in found for key, value in read_json(part.folder / "details.json").items()}
    return {
        "title": title,
        "place": place,
        "kind": about.kind(config),
        "price": about.price(summary, seconds),
        "highlights": _highlights(tables),
        "galleries": galleries(run_dir, found),
        "codebook": codebook([*found, Part(run_dir, "", {}, {}, 0.0)]),
        "confusion": confusion(details),
        "class_words": _class_words(tables),
        "tables": tables,
        "protocol": _protocol(run_dir),
        "curves": [(part.heading, *_curves(part)) for part in found],
        "facts": about.facts(config, summary, seconds),
        "command": command(run_dir, summary),
        "config": read_text(run_dir / ".hydra" / "config.yaml"),
        "versions": summary.get("versions") or versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what a run rests on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def number(value: Any) -> str:
    """Word a number with four digits that matter."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1e4 else f"{value:.4g}"


def worded(key: str, value: Any) -> str:
    """Word a number as its name asks for."""
    return f"{100 * value:.1f}\u00a0%" if key in SHARES and _is_finite(value) else number(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _tables(run_dir: Path, found: list[Part]) -> list[Table]:
    """Return what a protocol measured, the final table, or the last look at held-out data."""
    content = read_json(run_dir / "metrics.json")
    if isinstance(content.get("values"), dict) and isinstance(content.get("protocol"), dict):
        return [_measured(content)]
    final = {title: row for title, row in content.items() if isinstance(row, dict)}
    last = {
        f"{part.heading}, step {number(points[-1][0])}": {key: each[-1][1] for key, each in part.validation.items()}
        for part in found
        if (points := next(iter(part.validation.values()), None))
    }
    return [
        Table(title[:1].upper() + title[1:], [Row(key, value) for key, value in row.items()])
        for title, row in (final or last).items()
    ]


def _measured(content: Mapping[str, Any]) -> Table:
    """Return the table of a protocol, each number with its interval and its floor."""
    rows = []
    for key, value in content["values"].items():
        beside = []
        if isinstance(span := content.get("intervals", {}).get(key), list) and len(span) == 2:
            beside.append(f"95 %: {number(span[0])} to {number(span[1])}")
        if (floor := content.get("floors", {}).get(key)) is not None:
            beside.append(f"real against real: {number(floor)}")
        rows.append(Row(key, value, "; ".join(beside)))
    return Table(str(content["protocol"].get("name", "")), rows)


def _protocol(run_dir: Path) -> list[tuple[str, str]]:
    """Return the lines of the protocol that a run measured by, if it did."""
    content = read_json(run_dir / "metrics.json").get("protocol")
    return [(str(key), str(value)) for key, value in content.items()] if isinstance(content, dict) else []


def _highlights(tables: Iterable[Table]) -> list[tuple[str, str]]:
    """Return the numbers that are said first, and what each counts."""
    values = {row.name: row.number for table in tables for row in table.rows}
    return [
        (form.format(values[key]) or worded(key, values[key]), words)
        for key, (form, words) in HIGHLIGHTS.items()
        if _is_finite(values.get(key))
    ]


def _class_words(tables: Iterable[Table]) -> str:
    """Say what the classifier sees, for comparison."""
    values = {row.name: row.value for table in tables for row in table.rows}
    names = [f"class_accuracy{each}" for each in ("", "_real", "_drawn", "_chance")]
    if not all(name in values for name in names):
        return ""
    samples, real, drawn, chance = (values[name] for name in names)
    return (
        f"{samples} of the samples are seen as the class that was asked for. Of held-out pictures {real} are seen as "
        f"theirs, {drawn} once they have gone through the codes; guessing would hit {chance}."
    )


def _curves(part: Part) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Draw every key that was measured more than once: those that matter most, and the others."""
    drawn = {key: part.series(key) for key in part.keys}
    every = [(key, curve(series)) for key, series in drawn.items() if max(map(len, series.values())) > 1]
    return every[:CURVES], every[CURVES:]
