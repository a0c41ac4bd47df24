"""Tables of metrics of a run."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqf.loggers.report.metric_descriptions import HIGHLIGHTS, PERCENT_METRICS, describe_metric
from vqf.loggers.report.run_parts import RunPart, is_evaluation, read_evaluations
from vqf.run_files.records import read_record
from vqf.run_files.shapes import METRICS, is_finite, is_number
from vqf.terminal import format_number


@dataclass
class MetricRow:
    """One metric of a table."""

    name: str
    raw_value: Any
    note: str = ""  # confidence interval, and the value of real images against real images

    @property
    def text(self) -> str:
        return format_metric(self.name, self.raw_value)

    @property
    def description(self) -> str:
        return describe_metric(self.name)


@dataclass
class MetricTable:
    """Metrics that were measured together."""

    title: str
    rows: list[MetricRow]
    protocol: list[tuple[str, str]] = field(default_factory=list)


def read_tables(run_dir: Path, run_parts: Iterable[RunPart]) -> list[MetricTable]:
    """Return the run's own tables, then one for each protocol."""
    content = read_record(run_dir / "metrics.json", METRICS)
    own = [_evaluation_table(content)] if is_evaluation(content) else list(_training_tables(content, run_parts))
    return [*own, *(_evaluation_table(files[-1]) for files in read_evaluations(run_dir))]


def format_metric(key: str, value: Any) -> str:
    """Write a value in percent or with four significant digits."""
    if key in PERCENT_METRICS and is_finite(value):
        return f"{100 * value:.1f}\u00a0%"
    return _to_text(value)


def highlights(tables: Iterable[MetricTable]) -> list[tuple[str, str]]:
    """Return the large figures of the page as (value, meaning)."""
    values: dict[str, Any] = {}
    for table in tables:
        values = {row.name: row.raw_value for row in table.rows} | values
    return [
        (template.format(values[key]) or format_metric(key, values[key]), meaning)
        for key, (template, meaning) in HIGHLIGHTS.items()
        if is_finite(values.get(key))
    ]


def class_accuracy_sentence(tables: Iterable[MetricTable]) -> str:
    """Compare class accuracies with chance; "" if unknown."""
    values = {row.name: row.text for table in tables for row in table.rows}
    names = [f"class_accuracy{suffix}" for suffix in ("", "_real", "_decoded", "_chance")]
    if not all(name in values for name in names):
        return ""
    samples, real, decoded, chance = (values[name] for name in names)
    return (
        f"{samples} of the samples are classified as the class that was asked for. Of the validation images, {real} "
        f"are classified correctly, and {decoded} after encoding and decoding; chance is {chance}."
    )


def _training_tables(content: Mapping[str, Any], run_parts: Iterable[RunPart]) -> Iterator[MetricTable]:
    final = {title: row for title, row in content.items() if isinstance(row, dict)}
    last = {
        f"{part.heading}, step {format_number(last_step)}": {
            key: curve.last[1] for key, curve in part.validation.items() if curve.last
        }
        for part in run_parts
        if (last_step := part.last_validation_step) is not None
    }
    for title, row in (final or last).items():
        yield MetricTable(title[:1].upper() + title[1:], [MetricRow(key, value) for key, value in row.items()])


def _evaluation_table(content: Mapping[str, Any]) -> MetricTable:
    rows = []
    for key, value in content["values"].items():
        notes = []
        if interval := content.get("intervals", {}).get(key):
            notes.append(f"95 %: {_to_text(interval[0])} to {_to_text(interval[1])}")
        if (floor := content.get("floors", {}).get(key)) is not None:
            notes.append(f"real against real: {_to_text(floor)}")
        rows.append(MetricRow(key, value, "; ".join(notes)))
    lines = [(str(key), "none" if value is None else str(value)) for key, value in content["protocol"].items()]
    return MetricTable(_evaluation_title(content), rows, lines)


def _evaluation_title(content: Mapping[str, Any]) -> str:
    protocol, step = content["protocol"], content.get("checkpoint", {}).get("step")
    name = f"Measured by the protocol {protocol.get('name', '')}"
    count = f", {_to_text(protocol['count'])} images" if "count" in protocol else ""
    return name + count + (f", step {_to_text(step)}" if step is not None else "")


def _to_text(value: Any) -> str:
    return format_number(value) if is_number(value) else str(value)
