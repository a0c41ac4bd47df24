"""The numbers of a run as tables: what training measured last, and what evaluations did, each with its protocol."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqf.loggers.report.metric_descriptions import HIGHLIGHTS, PERCENT_METRICS, describe_metric
from vqf.loggers.report.run_files import RunPart, is_evaluation, read_evaluations, read_json


@dataclass
class MetricRow:
    """A number of a table."""

    name: str
    raw_value: Any
    note: str = ""  # its interval, and the same of real images

    @property
    def text(self) -> str:
        """The number as it is written."""
        return format_metric(self.name, self.raw_value)

    @property
    def description(self) -> str:
        """What it says."""
        return describe_metric(self.name)


@dataclass
class MetricTable:
    """Numbers that were measured together, and the lines of their protocol if they have one."""

    title: str
    rows: list[MetricRow]
    protocol: list[tuple[str, str]] = field(default_factory=list)


def read_tables(run_dir: Path, run_parts: Iterable[RunPart]) -> list[MetricTable]:
    """Return the tables of a run: its own first, then those of evaluations, of each protocol the newest weights."""
    content = read_json(run_dir / "metrics.json")
    own = [_evaluation_table(content)] if is_evaluation(content) else list(_training_tables(content, run_parts))
    return [*own, *(_evaluation_table(files[-1]) for files in read_evaluations(run_dir))]


def format_number(value: Any) -> str:
    """Word a number with four digits that matter."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1e4 else f"{value:.4g}"


def format_metric(key: str, value: Any) -> str:
    """Word a number as its name asks for."""
    return f"{100 * value:.1f}\u00a0%" if key in PERCENT_METRICS and _is_finite(value) else format_number(value)


def highlights(tables: Iterable[MetricTable]) -> list[tuple[str, str]]:
    """Return the numbers that are said first, and what each counts; of two tables the first has it."""
    values: dict[str, Any] = {}
    for table in tables:
        values = {row.name: row.raw_value for row in table.rows} | values
    return [
        (form.format(values[key]) or format_metric(key, values[key]), words)
        for key, (form, words) in HIGHLIGHTS.items()
        if _is_finite(values.get(key))
    ]


def class_accuracy_sentence(tables: Iterable[MetricTable]) -> str:
    """Say what the classifier sees, for comparison."""
    values = {row.name: row.text for table in tables for row in table.rows}
    names = [f"class_accuracy{each}" for each in ("", "_real", "_decoded", "_chance")]
    if not all(name in values for name in names):
        return ""
    samples, real, drawn, chance = (values[name] for name in names)
    return (
        f"{samples} of the samples are seen as the class that was asked for. Of held-out images {real} are seen as "
        f"theirs, {drawn} once they have gone through the codes; guessing would hit {chance}."
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _training_tables(content: Mapping[str, Any], run_parts: Iterable[RunPart]) -> Iterator[MetricTable]:
    """Yield the final tables of a training, or those of its last look at held-out data."""
    final = {title: row for title, row in content.items() if isinstance(row, dict)}
    last = {
        f"{part.heading}, step {format_number(points[-1][0])}": {
            key: each[-1][1] for key, each in part.validation.items()
        }
        for part in run_parts
        if (points := next(iter(part.validation.values()), None))
    }
    for title, row in (final or last).items():
        yield MetricTable(title[:1].upper() + title[1:], [MetricRow(key, value) for key, value in row.items()])


def _evaluation_table(content: Mapping[str, Any]) -> MetricTable:
    """Return the table of a protocol, each number with its interval and its floor."""
    rows = []
    for key, value in content["values"].items():
        beside = []
        if isinstance(span := content.get("intervals", {}).get(key), list) and len(span) == 2:
            beside.append(f"95 %: {format_number(span[0])} to {format_number(span[1])}")
        if (floor := content.get("floors", {}).get(key)) is not None:
            beside.append(f"real against real: {format_number(floor)}")
        rows.append(MetricRow(key, value, "; ".join(beside)))
    lines = [(str(key), "none" if value is None else str(value)) for key, value in content["protocol"].items()]
    return MetricTable(_evaluation_title(content), rows, lines)


def _evaluation_title(content: Mapping[str, Any]) -> str:
    protocol, step = content["protocol"], (content.get("checkpoint") or {}).get("step")
    named = f"Measured by the protocol {protocol.get('name', '')}"
    counted = f", {format_number(protocol['count'])} images" if "count" in protocol else ""
    return named + counted + (f", step {format_number(step)}" if step is not None else "")
