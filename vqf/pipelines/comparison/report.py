"""A comparison of runs as files: Markdown, CSV, and one page that needs nothing else."""

import csv
import importlib.resources
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqf import terminal
from vqf.config.diff import MISSING
from vqf.pipelines.comparison.metrics import MetricValue
from vqf.pipelines.comparison.ranking import Column, Ranking
from vqf.pipelines.comparison.reconstructions import ReconstructionPanels, latest_samples_uri, to_data_uri
from vqf.pipelines.comparison.runs import Run

FILE_STEM = "comparison"  # of the files
MAX_SHORT_METRICS = 3  # metrics where there is no room for all


@dataclass(frozen=True)
class Cell:
    """What a cell says, and whether it is a number, and the best of its column."""

    text: str
    is_number: bool = False
    is_best: bool = False


@dataclass
class ComparisonReport:
    """Everything that is shown.

    Attributes:
        skipped_runs: Runs of which there is nothing to compare; each says why.
        commands: What made the runs, and this.
    """

    ranking: Ranking
    reconstructions: ReconstructionPanels
    skipped_runs: Sequence[Run]
    commands: Sequence[str]

    def header(self) -> list[str]:
        """Name the columns."""
        ranking = self.ranking
        names = ["", "run", *ranking.options, *_COST_HEADER, *map(ranking.heading, ranking.columns), *_SIZE_HEADER]
        return [*names, "state"] if self._unfinished() else names

    def rows(self) -> list[list[Cell]]:
        """Return the cells, the best run first."""
        return [self._row(place, i) for place, i in enumerate(self.ranking.order, 1)]

    def notes(self) -> list[str]:
        """Say what has to be known to read the table."""
        ranking = self.ranking
        said = [f"Sorted by {ranking.sort_description}."]
        for label, lines in ranking.protocols.items():
            metrics = ", ".join(column.metric for column in ranking.columns if column.label == label)
            protocol = ", ".join(f"{key} {value}" for key, value in lines.items() if key != "name")
            said.append(f"{label} ({metrics}): {protocol}.")
        floors = {
            f"{ranking.heading(column)} {number.floor:.4g}"
            for column in ranking.columns
            for number in column.values.values()
            if number.floor is not None
        }
        said += [f"Real images against real ones: {', '.join(sorted(floors))}."] * bool(floors)
        said += [f"{line}." for line in ranking.protocol_differences()]
        said += [f"Not comparable: {line}." for line in ranking.not_comparable]
        said += [f"No images of {line}." for line in self.reconstructions.skipped]
        return said + [f"Left out: {run.name}, {run.status}." for run in self.skipped_runs]

    def write(self, folder: Path) -> Path:
        """Write `comparison.md`, `.csv` and `.html` into a folder; returns the page."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{FILE_STEM}.md").write_text(self.markdown(), encoding="utf-8")
        with (folder / f"{FILE_STEM}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(self.csv_rows())
        page = folder / f"{FILE_STEM}.html"
        page.write_text(self.html(), encoding="utf-8")
        return page

    def markdown(self) -> str:
        """Return table and notes as Markdown, the best of every column bold."""
        rows = self.rows()
        numeric = [bool(rows) and rows[0][j].is_number for j in range(len(self.header()))]
        lines = [
            self.header(),
            ["---:" if right else "---" for right in numeric],
            *([f"**{cell.text}**" if cell.is_best else cell.text for cell in row] for row in rows),
        ]
        table = [f"| {' | '.join(each.replace('|', chr(92) + '|') for each in line)} |" for line in lines]
        notes, commands = [f"* {line}" for line in self.notes()], [f"    {line}" for line in self.commands]
        return "\n".join([*table, "", *notes, "", *commands, ""])

    def csv_rows(self) -> list[list[Any]]:
        """Return the table with whole numbers, every metric under the name of its protocol."""
        ranking = self.ranking
        spans = [column for column in ranking.columns if any(each.interval for each in column.values.values())]
        header = ["run", "folder", "state", "step", "steps", "seconds", "processor_seconds", "parameters"]
        header += [*ranking.options, *(each.name for each in ranking.columns)]
        header += [f"{each.name} {end}" for each in spans for end in ("low", "high")]
        header += [f"{each.name} step" for each in self._columns_at_older_steps()]
        return [header, *(self._csv_row(i, spans) for i in ranking.order)]

    def html(self) -> str:
        """Return the page."""
        from jinja2 import Environment, StrictUndefined

        source = (importlib.resources.files("vqf.pipelines.comparison") / "report.html.j2").read_text(encoding="utf-8")
        template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(source)
        return template.render(
            header=self.header(),
            rows=self.rows(),
            notes=self.notes(),
            panels=self._panels(),
            samples=self._samples(),
            commands=self.commands,
        )

    def print_table(self) -> None:
        """Print the table, with as much as fits."""
        header, rows, columns = self.header(), self.rows(), self.ranking.columns
        first = 2 + len(self.ranking.options)
        metrics = [first + len(_COST_HEADER) + columns.index(each) for each in self._short_columns()]
        shown = [*range(first), *metrics, *(j for j, name in enumerate(header) if name in ("time", "state"))]
        names = [header[j].rpartition("/")[2] for j in shown]
        terminal.print_table("comparison", names, [[row[j].text for j in shown] for row in rows])
        for line in self.notes():
            terminal.log.info("%s", line)

    def _row(self, rank: int, i: int) -> list[Cell]:
        ranking, run = self.ranking, self.ranking.runs[i]
        cells = [Cell(str(rank), True), Cell(run.name)]
        cells += [Cell(values[i]) for values in ranking.options.values()]
        cells += [Cell(each, True) for each in _cost_cells(run)]
        cells += [_metric_cell(column, column.values.get(i), run) for column in ranking.columns]
        cells += [Cell(each, True) for each in _size_cells(run, ranking.parameters[i])]
        return [*cells, Cell(run.status or "finished")] if self._unfinished() else cells

    def _csv_row(self, i: int, interval_columns: Sequence[Column]) -> list[Any]:
        ranking, run = self.ranking, self.ranking.runs[i]
        facts = [run.name, run.folder, run.status or "finished", run.step, run.steps, round(run.seconds, 1)]
        facts += [run.processor_seconds, ranking.parameters[i], *(values[i] for values in ranking.options.values())]
        numbers = [column.values.get(i) for column in ranking.columns]
        ends = [(each.values[i].interval or ("", "")) if i in each.values else ("", "") for each in interval_columns]
        steps = [each.values[i].step if i in each.values else "" for each in self._columns_at_older_steps()]
        return [*facts, *(each and each.value for each in numbers), *(end for pair in ends for end in pair), *steps]

    def _columns_at_older_steps(self) -> list[Column]:
        """Return the columns with a number that is of other weights than its run's newest."""
        runs = self.ranking.runs
        return [
            column
            for column in self.ranking.columns
            if any(not _is_newest(number, runs[i]) for i, number in column.values.items())
        ]

    def _unfinished(self) -> bool:
        return any(run.status for run in self.ranking.runs)

    def _short_columns(self) -> list[Column]:
        """Return some metrics: what the table is sorted by, then others, of each family the first."""
        columns = sorted(self.ranking.columns, key=lambda each: each is not self.ranking.sort_column)
        return list({each.metric.partition("_")[0]: each for each in reversed(columns)}.values())[::-1][
            :MAX_SHORT_METRICS
        ]

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
        found = {i: latest_samples_uri(self.ranking.runs[i]) for i in self.ranking.order}
        return [
            {"name": self._run_title(i), "caption": self._run_caption(i), "uri": uri} for i, uri in found.items() if uri
        ]

    def _run_title(self, i: int) -> str:
        """Name a run by what it was made with, or by its folder where that is all that differs."""
        values = [values[i] for values in self.ranking.options.values() if values[i] != MISSING]
        return " · ".join(values) or self.ranking.runs[i].name

    def _run_caption(self, i: int) -> str:
        columns = [column for column in self._short_columns() if i in column.values]
        numbers = [f"{self.ranking.heading(each)} {_format_number(each.values[i].value)}" for each in columns]
        return f"{self.ranking.runs[i].name}: {', '.join(numbers)}"


# In front of the numbers, where a narrow screen shows them, and behind.
_COST_HEADER, _SIZE_HEADER = ("steps", "time"), ("processor time", "parameters")


def _cost_cells(run: Run) -> list[str]:
    steps = f"{run.step:,}" if run.step >= run.steps else f"{run.step:,} of {run.steps:,}"
    return [steps, _format_seconds(run.seconds)]


def _size_cells(run: Run, parameters: int | None) -> list[str]:
    processor = "–" if run.processor_seconds is None else _format_seconds(run.processor_seconds)
    return [processor, "–" if parameters is None else f"{parameters:,}"]


def _metric_cell(column: Column, metric: MetricValue | None, run: Run) -> Cell:
    if metric is None:
        return Cell("–", True)
    text = _format_number(metric.value)
    if metric.interval is not None:
        text += f" ({_format_number(metric.interval[0])} to {_format_number(metric.interval[1])})"
    if not _is_newest(metric, run):
        text += f" at step {metric.step:,}"
    return Cell(text, True, len(column.values) > 1 and metric.value == column.best)


def _is_newest(metric: MetricValue, run: Run) -> bool:
    return metric.step in {each.step for each in run.checkpoints}


def _format_number(value: float) -> str:
    """Word a number with four digits that matter, as many in every row."""
    whole = value == round(value) if math.isfinite(value) else False
    return f"{value:,.0f}" if whole or abs(value) >= 9999.5 else f"{value:#.4g}"


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
