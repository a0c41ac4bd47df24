"""The numbers of a run as tables: what training measured last, and what evaluations did, each with its protocol."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqf.loggers.report.metric_descriptions import HIGHLIGHTS, SHARES, meaning
from vqf.loggers.report.run_files import Part, evaluations, is_measured, read_json


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
    """Numbers that were measured together, and the lines of their protocol if they have one."""

    title: str
    rows: list[Row]
    protocol: list[tuple[str, str]] = field(default_factory=list)


def tables(run_dir: Path, found: Iterable[Part]) -> list[Table]:
    """Return the tables of a run: its own first, then those of evaluations, of each protocol the newest weights."""
    content = read_json(run_dir / "metrics.json")
    own = [_measured(content)] if is_measured(content) else list(_trained(content, found))
    return [*own, *(_measured(files[-1]) for files in evaluations(run_dir))]


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


def highlights(tables: Iterable[Table]) -> list[tuple[str, str]]:
    """Return the numbers that are said first, and what each counts; of two tables the first has it."""
    values: dict[str, Any] = {}
    for table in tables:
        values = {row.name: row.number for row in table.rows} | values
    return [
        (form.format(values[key]) or worded(key, values[key]), words)
        for key, (form, words) in HIGHLIGHTS.items()
        if _is_finite(values.get(key))
    ]


def class_words(tables: Iterable[Table]) -> str:
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


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _trained(content: Mapping[str, Any], found: Iterable[Part]) -> Iterator[Table]:
    """Yield the final tables of a training, or those of its last look at held-out data."""
    final = {title: row for title, row in content.items() if isinstance(row, dict)}
    last = {
        f"{part.heading}, step {number(points[-1][0])}": {key: each[-1][1] for key, each in part.validation.items()}
        for part in found
        if (points := next(iter(part.validation.values()), None))
    }
    for title, row in (final or last).items():
        yield Table(title[:1].upper() + title[1:], [Row(key, value) for key, value in row.items()])


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
    lines = [(str(key), "none" if value is None else str(value)) for key, value in content["protocol"].items()]
    return Table(_title(content), rows, lines)


def _title(content: Mapping[str, Any]) -> str:
    protocol, step = content["protocol"], (content.get("checkpoint") or {}).get("step")
    named = f"Measured by the protocol {protocol.get('name', '')}"
    counted = f", {number(protocol['count'])} pictures" if "count" in protocol else ""
    return named + counted + (f", step {number(step)}" if step is not None else "")
