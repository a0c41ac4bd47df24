"""Ranks runs in a table that never mixes protocols in a column."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vqf.config.diff import differing_options
from vqf.errors import UserError, unknown_message
from vqf.evaluation.protocols import stable_hash
from vqf.pipelines.comparison.metrics import MetricValue
from vqf.pipelines.comparison.runs import Run
from vqf.terminal import format_number

# Metrics for which lower is better, where the metric itself does not say; for all others higher is.
LOWER_IS_BETTER = re.compile(
    r"(^|_)[rg]?fi?d(_|$)|^k[id]d?(_|$)|lpips|perceptual|nats|loss|^l[12]$|mse|error|^dead_codes$"
)

SORT_KEYS = ("name", "step", "seconds", "processor_seconds", "parameters")  # beside metrics
METRIC_LINE_PREFIXES = ("metric.", "tokenizer")  # of protocol lines that concern a single metric only


@dataclass
class Column:
    """The values of a metric by one protocol."""

    metric: str
    protocol: Mapping[str, str]
    values: dict[int, MetricValue]  # by the index of the run
    label: str = ""  # of the protocol
    suffix: str = ""  # distinguishes columns of the same metric and label, as in " (metric.k 5)"

    @property
    def name(self) -> str:
        return f"{self.label}/{self.metric}{self.suffix}"

    @property
    def lower_is_better(self) -> bool:
        declared = [value.higher_is_better for value in self.values.values() if value.higher_is_better is not None]
        return not declared[0] if declared else bool(LOWER_IS_BETTER.search(self.metric))

    @property
    def best(self) -> float:
        values = [value.value for value in self.values.values()]
        return min(values) if self.lower_is_better else max(values)

    @property
    def from_evaluation(self) -> bool:
        return next(iter(self.values.values())).from_evaluation


@dataclass
class Ranking:
    """Runs in order, with the columns of their table.

    Attributes:
        order: Indices of runs, best first.
        columns: Metrics by protocol; with several runs, each has values of at least two.
        options: Config options in which the runs differ, with the value of every run.
        not_comparable: A sentence for each run with values that no other run has by the same protocol.
        protocols: By label, the lines that all columns of a protocol share.
    """

    runs: Sequence[Run]
    parameters: Sequence[int | None]
    order: list[int]
    columns: list[Column]
    options: dict[str, list[str]]
    not_comparable: list[str]
    sort_description: str
    protocols: dict[str, Mapping[str, str]] = field(default_factory=dict)
    sort_column: Column | None = None

    def heading(self, column: Column) -> str:
        """Return the metric if it is unambiguous, or the unique name."""
        ambiguous = sum(other.metric == column.metric for other in self.columns) > 1
        return column.name if ambiguous else column.metric

    def protocol_differences(self) -> list[str]:
        first_columns: dict[str, Column] = {}
        sentences = []
        for column in self.columns:
            first = first_columns.setdefault(column.metric, column)
            if first is not column:
                difference = describe_difference(first.protocol, column.protocol)
                names = f"{first.label}{first.suffix} and {column.label}{column.suffix}"
                sentences.append(f"{names} differ in {difference}")
        return list(dict.fromkeys(sentences))


def rank(runs: Sequence[Run], parameters: Sequence[int | None], sort: str | None) -> Ranking:
    """Rank runs.

    Args:
        sort: A metric, `protocol/metric`, or one of `SORT_KEYS`, with a leading minus to reverse; by default the first
            metric of the protocol that most runs share.

    Raises:
        UserError: If there is no such column, or several protocols measured it.
    """
    columns = _build_columns(runs)
    shared = [column for column in columns if len(column.values) > 1 or len(runs) == 1]
    protocols = _label_protocols(shared)
    ranking = Ranking(runs, parameters, [], shared, differing_options([run.config for run in runs]), [], "", protocols)
    ranking.not_comparable = _describe_not_comparable(
        runs, [column for column in columns if column not in shared], columns
    )
    _set_order(ranking, columns, sort)
    return ranking


def describe_difference(first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """List the lines in which two protocols differ."""
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    return "; ".join(f"{key}: {first.get(key, 'none')} and {second.get(key, 'none')}" for key in keys)


def _build_columns(runs: Sequence[Run]) -> list[Column]:
    """Return the columns, evaluations first; without trainings if every run has an evaluation."""
    all_evaluated = all(
        any(value.from_evaluation for values in run.metrics.values() for value in values) for run in runs
    )
    columns: dict[tuple[str, str], Column] = {}
    for i, run in enumerate(runs):
        for metric, values in run.metrics.items():
            for value in values:
                if value.from_evaluation or not all_evaluated:
                    key = metric, stable_hash(value.protocol)
                    columns.setdefault(key, Column(metric, value.protocol, {})).values[i] = value
    return sorted(columns.values(), key=lambda column: not column.from_evaluation)


def _label_protocols(columns: Sequence[Column]) -> dict[str, Mapping[str, str]]:
    """Set label and suffix of columns; returns the lines of each protocol by label.

    Columns that differ only in `METRIC_LINE_PREFIXES` share a label.
    """
    groups: dict[str, list[Column]] = {}
    for column in columns:
        groups.setdefault(stable_hash(_shared_lines(column.protocol)), []).append(column)
    names = [_shared_lines(group[0].protocol).get("name", "unnamed") for group in groups.values()]
    for name, (shared_hash, group) in zip(names, groups.items(), strict=True):
        file_hashes = [value.protocol_hash for column in group for value in column.values.values()]
        protocol_hash = next(filter(None, file_hashes), shared_hash)
        for column in group:
            column.label = name if names.count(name) == 1 else f"{name}-{protocol_hash[:8]}"
            column.suffix = _suffix(column, [other for other in group if other.metric == column.metric])
    return {group[0].label: _shared_lines(group[0].protocol) for group in groups.values()}


def _shared_lines(protocol: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in protocol.items() if not key.startswith(METRIC_LINE_PREFIXES)}


def _suffix(column: Column, same_metric: Sequence[Column]) -> str:
    differ = [
        key for key, value in column.protocol.items() if any(other.protocol.get(key) != value for other in same_metric)
    ]
    return f" ({', '.join(f'{key} {column.protocol[key]}' for key in differ)})" if differ else ""


def _describe_not_comparable(
    runs: Sequence[Run], single_run_columns: Sequence[Column], columns: Sequence[Column]
) -> list[str]:
    values_by_reason: dict[tuple[int, str], list[str]] = {}
    for column in single_run_columns:
        ((i, value),) = column.values.items()
        others = [other for other in columns if other.metric == column.metric and other is not column]
        if others:
            names = ", ".join(runs[j].name for j in others[0].values)
            difference = describe_difference(column.protocol, others[0].protocol)
            reason = f"not in one column with {names}: {difference}"
        else:
            reason = "no other run has it" if len(runs) > 1 else ""
        values_by_reason.setdefault((i, reason), []).append(f"{column.metric} {format_number(value.value)}")
    return [f"{runs[i].name}: {', '.join(values)} – {reason}" for (i, reason), values in values_by_reason.items()]


def _set_order(ranking: Ranking, columns: Sequence[Column], sort: str | None) -> None:
    reverse = sort is not None and sort.startswith("-")
    key = None if sort is None else sort.removeprefix("-")
    indices = range(len(ranking.runs))
    if key in SORT_KEYS:
        values = ((i, _sort_value(ranking, i, key)) for i in indices)
        known: dict[int, Any] = {i: value for i, value in values if value is not None}
        order = sorted(known, key=known.__getitem__, reverse=reverse)
        ranking.sort_description = key
    elif key is None and not ranking.columns:
        order, ranking.sort_description = list(indices), "the order given: no metric can be compared"
    else:
        column = _default_column(ranking.columns) if key is None else _find_column(ranking, columns, key)
        descending = column.lower_is_better == reverse
        order = sorted(column.values, key=lambda i: column.values[i].value, reverse=descending)
        ranking.sort_column = column
        ranking.sort_description = f"{ranking.heading(column)}, {'highest' if descending else 'lowest'} first"
    ranking.order = order + [i for i in indices if i not in order]


def _default_column(columns: Sequence[Column]) -> Column:
    return max(columns, key=lambda column: (len(column.values), column.from_evaluation))  # the first of equals


def _find_column(ranking: Ranking, columns: Sequence[Column], name: str) -> Column:
    by_name = {column.name: column for column in ranking.columns}
    if name in by_name:
        return by_name[name]
    matches = [column for column in columns if column.metric == name]
    shared = [column for column in matches if column in ranking.columns]
    if len(shared) == 1:
        return shared[0]
    if len(matches) < 2:
        known = [*dict.fromkeys(map(ranking.heading, ranking.columns)), *SORT_KEYS]
        raise UserError(f"sort={name}: {unknown_message('column', name, known)}")
    first, second = (shared or matches)[:2]
    runs = [", ".join(ranking.runs[i].name for i in column.values) for column in (first, second)]
    choices = [f"sort={column.name}" if not column.suffix else f"'sort=\"{column.name}\"'" for column in shared]
    cure = f"give {' or '.join(choices)}" if shared else "evaluate them by one protocol with pipeline=evaluate run=..."
    raise UserError(
        f"sort={name}: two protocols measured it ({runs[0]} by one, {runs[1]} by another); no column mixes them; "
        f"they differ in {describe_difference(first.protocol, second.protocol)}; {cure}"
    )


def _sort_value(ranking: Ranking, i: int, name: str) -> float | str | None:
    return ranking.parameters[i] if name == "parameters" else getattr(ranking.runs[i], name)
