"""A comparison as Markdown, CSV and HTML."""

import csv
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqf import terminal
from vqf.config.diff import MISSING
from vqf.errors import printable
from vqf.pipelines.comparison.metrics import MetricValue
from vqf.pipelines.comparison.ranking import Column, Ranking
from vqf.pipelines.comparison.reconstructions import ReconstructionPanels, latest_samples_uri, to_data_uri
from vqf.pipelines.comparison.runs import Run
from vqf.terminal import format_number, format_seconds

FILE_STEM = "comparison"  # comparison.md, .csv, .html
MAX_SHORT_METRICS = 3  # on the terminal and in captions


@dataclass(frozen=True)
class Cell:
    """A cell of the table."""

    text: str
    is_number: bool = False
    is_best: bool = False


@dataclass
class ComparisonReport:
    """Renders a ranking.

    Attributes:
        commands: The command of this comparison; after a sweep, the sweep's before it.
    """

    ranking: Ranking
    reconstructions: ReconstructionPanels
    skipped_runs: Sequence[Run]
    commands: Sequence[str]

    def header(self) -> list[str]:
        ranking = self.ranking
        names = ["", "run", *ranking.options, *_COST_HEADER, *map(ranking.heading, ranking.columns), *_SIZE_HEADER]
        return [*names, "state"] if self._unfinished() else names

    def rows(self) -> list[list[Cell]]:
        return [self._row(rank, i) for rank, i in enumerate(self.ranking.order, 1)]

    def notes(self) -> list[str]:
        ranking = self.ranking
        notes = [f"Sorted by {ranking.sort_description}."]
        for label, lines in ranking.protocols.items():
            metrics = ", ".join(column.metric for column in ranking.columns if column.label == label)
            protocol = ", ".join(f"{key} {value}" for key, value in lines.items() if key != "name")
            notes.append(f"{label} ({metrics}): {protocol}.")
        floors = {
            f"{ranking.heading(column)} {format_number(value.floor)}"
            for column in ranking.columns
            for value in column.values.values()
            if value.floor is not None
        }
        notes += [f"Real images against real ones: {', '.join(sorted(floors))}."] * bool(floors)
        notes += [f"{line}." for line in ranking.protocol_differences()]
        notes += [f"Not comparable: {line}." for line in ranking.not_comparable]
        notes += [f"No images of {line}." for line in self.reconstructions.skipped]
        return notes + [f"Left out: {run.name}, {run.status}." for run in self.skipped_runs]

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{FILE_STEM}.md").write_text(self.markdown(), encoding="utf-8")
        with (folder / f"{FILE_STEM}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(self.csv_rows())
        page = folder / f"{FILE_STEM}.html"
        page.write_text(self.html(), encoding="utf-8")
        return page

    def markdown(self) -> str:
        rows = self.rows()
        numeric = [bool(rows) and rows[0][j].is_number for j in range(len(self.header()))]
        lines = [
            self.header(),
            ["---:" if right else "---" for right in numeric],
            *([f"**{cell.text}**" if cell.is_best else cell.text for cell in row] for row in rows),
        ]
        table = [f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in lines]
        notes, commands = [f"* {line}" for line in self.notes()], [f"    {line}" for line in self.commands]
        return "".join(f"{printable(line)}\n" for line in [*table, "", *notes, "", *commands])

    def csv_rows(self) -> list[list[Any]]:
        ranking = self.ranking
        with_interval = [column for column in ranking.columns if any(v.interval for v in column.values.values())]
        header = ["run", "folder", "state", "step", "steps", "seconds", "processor_seconds", "parameters"]
        header += [*ranking.options, *(column.name for column in ranking.columns)]
        header += [f"{column.name} {end}" for column in with_interval for end in ("low", "high")]
        header += [f"{column.name} step" for column in self._columns_at_older_steps()]
        return [header, *(self._csv_row(i, with_interval) for i in ranking.order)]

    def html(self) -> str:
        from jinja2 import Environment, StrictUndefined

        source = (importlib.resources.files("vqf.pipelines.comparison") / "report.html.j2").read_text(encoding="utf-8")
        environment = Environment(
            autoescape=True, finalize=terminal.printable_value, undefined=StrictUndefined, trim_blocks=True
        )
        template = environment.from_string(source)
        return template.render(
            header=self.header(),
            rows=self.rows(),
            notes=self.notes(),
            panels=self._panels(),
            samples=self._samples(),
            commands=self.commands,
        )

    def print_table(self) -> None:
        header, rows, columns = self.header(), self.rows(), self.ranking.columns
        first = 2 + len(self.ranking.options)
        metrics = [first + len(_COST_HEADER) + columns.index(column) for column in self._short_columns()]
        shown = [*range(first), *metrics, *(j for j, name in enumerate(header) if name in ("time", "state"))]
        names = [header[j].rpartition("/")[2] for j in shown]
        terminal.print_table("comparison", names, [[row[j].text for j in shown] for row in rows])
        for line in self.notes():
            terminal.log.info("%s", line)

    def _row(self, rank: int, i: int) -> list[Cell]:
        ranking, run = self.ranking, self.ranking.runs[i]
        cells = [Cell(str(rank), True), Cell(run.name)]
        cells += [Cell(values[i]) for values in ranking.options.values()]
        cells += [Cell(text, True) for text in _cost_cells(run)]
        cells += [_metric_cell(column, column.values.get(i), run) for column in ranking.columns]
        cells += [Cell(text, True) for text in _size_cells(run, ranking.parameters[i])]
        return [*cells, Cell(run.status or "finished")] if self._unfinished() else cells

    def _csv_row(self, i: int, interval_columns: Sequence[Column]) -> list[Any]:
        ranking, run = self.ranking, self.ranking.runs[i]
        facts = [run.name, run.folder, run.status or "finished", run.step, run.steps, round(run.seconds, 1)]
        facts += [run.processor_seconds, ranking.parameters[i], *(values[i] for values in ranking.options.values())]
        metrics = [column.values.get(i) for column in ranking.columns]
        intervals = [
            column.values[i].interval or ("", "") if i in column.values else ("", "") for column in interval_columns
        ]
        steps = [column.values[i].step if i in column.values else "" for column in self._columns_at_older_steps()]
        values = [metric and metric.value for metric in metrics]
        return [*facts, *values, *(end for interval in intervals for end in interval), *steps]

    def _columns_at_older_steps(self) -> list[Column]:
        runs = self.ranking.runs
        return [
            column
            for column in self.ranking.columns
            if any(not _is_newest(metric, runs[i]) for i, metric in column.values.items())
        ]

    def _unfinished(self) -> bool:
        return any(run.status for run in self.ranking.runs)

    def _short_columns(self) -> list[Column]:
        """Return up to `MAX_SHORT_METRICS` columns: the sort column, then the first of each family (psnr, psnr_*)."""
        families: dict[str, Column] = {}
        for column in sorted(self.ranking.columns, key=lambda column: column is not self.ranking.sort_column):
            families.setdefault(column.metric.partition("_")[0], column)
        return list(families.values())[:MAX_SHORT_METRICS]

    def _panels(self) -> list[dict[str, Any]]:
        return [
            {
                "title": panel.title,
                "originals": to_data_uri(panel.originals),
                "reconstructions": [
                    {
                        "name": self._run_title(i),
                        "caption": self._run_caption(i),
                        "uri": to_data_uri(panel.reconstructions[i]),
                    }
                    for i in self.ranking.order
                    if i in panel.reconstructions
                ],
            }
            for panel in self.reconstructions.panels
        ]

    def _samples(self) -> list[dict[str, str]]:
        uris = {i: latest_samples_uri(self.ranking.runs[i]) for i in self.ranking.order}
        return [
            {"name": self._run_title(i), "caption": self._run_caption(i), "uri": uri} for i, uri in uris.items() if uri
        ]

    def _run_title(self, i: int) -> str:
        values = [values[i] for values in self.ranking.options.values() if values[i] != MISSING]
        return " · ".join(values) or self.ranking.runs[i].name

    def _run_caption(self, i: int) -> str:
        columns = [column for column in self._short_columns() if i in column.values]
        metrics = [f"{self.ranking.heading(column)} {format_number(column.values[i].value)}" for column in columns]
        return f"{self.ranking.runs[i].name}: {', '.join(metrics)}"


# The cost is left of the metrics, where a narrow screen shows it; the size right of them.
_COST_HEADER, _SIZE_HEADER = ("steps", "time"), ("processor time", "parameters")


def _cost_cells(run: Run) -> list[str]:
    steps = f"{run.step:,}" if run.step >= run.steps else f"{run.step:,} of {run.steps:,}"
    return [steps, format_seconds(run.seconds)]


def _size_cells(run: Run, parameters: int | None) -> list[str]:
    processor = "–" if run.processor_seconds is None else format_seconds(run.processor_seconds)
    return [processor, "–" if parameters is None else f"{parameters:,}"]


def _metric_cell(column: Column, metric: MetricValue | None, run: Run) -> Cell:
    if metric is None:
        return Cell("–", True)
    text = format_number(metric.value)
    if metric.interval is not None:
        text += f" ({format_number(metric.interval[0])} to {format_number(metric.interval[1])})"
    if not _is_newest(metric, run):
        text += f" at step {metric.step:,}"
    return Cell(text, True, len(column.values) > 1 and metric.value == column.best)


def _is_newest(metric: MetricValue, run: Run) -> bool:
    return metric.step in {checkpoint.step for checkpoint in run.checkpoints}
