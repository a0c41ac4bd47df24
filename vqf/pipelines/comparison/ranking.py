"""One table over runs, in which no column holds numbers of two protocols."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vqf.config.diff import differing_options
from vqf.errors import UserError, unknown_message
from vqf.evaluation.protocols import stable_hash
from vqf.pipelines.comparison.metrics import MetricValue
from vqf.pipelines.comparison.runs import Run

# Numbers of which less is better where their metrics do not say; of all others more is.
LOWER_IS_BETTER = re.compile(
    r"(^|_)[rg]?fi?d(_|$)|^k[id]d?(_|$)|lpips|perceptual|nats|loss|^l[12]$|mse|error|^dead_codes$"
)

SORT_KEYS = ("name", "step", "seconds", "processor_seconds", "parameters")  # that a table can be sorted by as well
METRIC_LINE_PREFIXES = ("metric.", "tokenizer")  # how lines begin that are not the protocol's but a single number's


@dataclass
class Column:
    """A metric by one protocol, and its numbers by run."""

    metric: str
    protocol: Mapping[str, str]
    values: dict[int, MetricValue]  # by the run's place in the list
    label: str = ""  # of the protocol
    suffix: str = ""  # what tells it from others of this metric and protocol

    @property
    def name(self) -> str:
        """What it is called where it could be taken for another."""
        return f"{self.label}/{self.metric}{self.suffix}"

    @property
    def lower_is_better(self) -> bool:
        """Whether less is better: as the metric says, or its name."""
        said = [each.higher_is_better for each in self.values.values() if each.higher_is_better is not None]
        return not said[0] if said else bool(LOWER_IS_BETTER.search(self.metric))

    @property
    def best(self) -> float:
        """The best of its values."""
        values = [number.value for number in self.values.values()]
        return min(values) if self.lower_is_better else max(values)

    @property
    def from_evaluation(self) -> bool:
        """Whether pipeline=evaluate gave the numbers."""
        return next(iter(self.values.values())).from_evaluation


@dataclass
class Ranking:
    """Runs, best first, and what can be said of them.

    Attributes:
        order: Places of runs in the list, best first.
        columns: Metrics by protocol, each with the numbers of at least two runs, if there are two.
        options: Those in which the runs differ, with their values in the order of the list.
        not_comparable: A sentence for all numbers that no other run's can be compared with.
        sort_description: What it is sorted by, in words.
        sort_column: The column that it is sorted by, if it is one.
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
        """Name a column as shortly as it can be told from the others."""
        twice = sum(each.metric == column.metric for each in self.columns) > 1
        return column.name if twice else column.metric

    def protocol_differences(self) -> list[str]:
        """Say why a metric has several columns: in which lines each differs from the first of them."""
        first: dict[str, Column] = {}
        said = []
        for each in self.columns:
            other = first.setdefault(each.metric, each)
            if other is not each:
                names = [f"{one.label}{one.suffix}" for one in (other, each)]
                said.append(f"{names[0]} and {names[1]} differ in {describe_difference(other.protocol, each.protocol)}")
        return list(dict.fromkeys(said))


def rank(runs: Sequence[Run], parameters: Sequence[int | None], sort: str | None) -> Ranking:
    """Put runs into one table.

    Args:
        runs: In any order.
        parameters: Of each, if known.
        sort: A metric, `protocol/metric` where several protocols measured it, or one of `SORT_KEYS`; by default the
            first metric of the protocol that most runs share. A minus in front turns the order round.

    Raises:
        UserError: If there is no such column, or if it would hold numbers of two protocols.
    """
    columns = _build_columns(runs)
    shared = [each for each in columns if len(each.values) > 1 or len(runs) == 1]
    protocols = _label_protocols(shared)
    ranking = Ranking(runs, parameters, [], shared, differing_options([run.config for run in runs]), [], "", protocols)
    ranking.not_comparable = _describe_not_comparable(runs, [each for each in columns if each not in shared], columns)
    _set_order(ranking, columns, sort)
    return ranking


def describe_difference(first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """Say which lines of two protocols differ."""
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    return "; ".join(f"{key}: {first.get(key, 'none')} and {second.get(key, 'none')}" for key in keys)


def _build_columns(runs: Sequence[Run]) -> list[Column]:
    """Return a column for every metric and protocol; looks of a training only where a run has no evaluation."""
    everywhere = all(any(each.from_evaluation for found in run.metrics.values() for each in found) for run in runs)
    columns: dict[tuple[str, str], Column] = {}
    for i, run in enumerate(runs):
        for metric, found in run.metrics.items():
            for number in found:
                if number.from_evaluation or not everywhere:
                    key = metric, stable_hash(number.protocol)
                    columns.setdefault(key, Column(metric, number.protocol, {})).values[i] = number
    return sorted(columns.values(), key=lambda each: not each.from_evaluation)


def _label_protocols(columns: Sequence[Column]) -> dict[str, Mapping[str, str]]:
    """Name the protocols of columns; what only one number depends on does not make another protocol."""
    groups: dict[str, list[Column]] = {}
    for column in columns:
        groups.setdefault(stable_hash(_shared_lines(column.protocol)), []).append(column)
    names = [_shared_lines(group[0].protocol).get("name", "unnamed") for group in groups.values()]
    for name, (mark, group) in zip(names, groups.items(), strict=True):
        known = next(
            (each.protocol_hash for column in group for each in column.values.values() if each.protocol_hash), mark
        )
        for column in group:
            column.label = name if names.count(name) == 1 else f"{name}-{known[:8]}"
            column.suffix = _suffix(column, [each for each in group if each.metric == column.metric])
    return {group[0].label: _shared_lines(group[0].protocol) for group in groups.values()}


def _shared_lines(protocol: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in protocol.items() if not key.startswith(METRIC_LINE_PREFIXES)}


def _suffix(column: Column, same_metric: Sequence[Column]) -> str:
    """Word what tells a column from others of its metric and protocol; empty where it is the only one."""
    differ = [
        key for key, value in column.protocol.items() if any(each.protocol.get(key) != value for each in same_metric)
    ]
    return f" ({', '.join(f'{key} {column.protocol[key]}' for key in differ)})" if differ else ""


def _describe_not_comparable(
    runs: Sequence[Run], single_run_columns: Sequence[Column], columns: Sequence[Column]
) -> list[str]:
    """Say of every run which of its numbers stand alone, and which line keeps them apart."""
    said: dict[tuple[int, str], list[str]] = {}
    for column in single_run_columns:
        ((i, number),) = column.values.items()
        others = [each for each in columns if each.metric == column.metric and each is not column]
        if others:
            other = others[0]
            whose = ", ".join(runs[j].name for j in other.values)
            why = f"cannot stand in one column with {whose}: {describe_difference(column.protocol, other.protocol)}"
        else:
            why = "no other run has it" if len(runs) > 1 else ""
        said.setdefault((i, why), []).append(f"{column.metric} {number.value:.4g}")
    return [f"{runs[i].name}: {', '.join(numbers)} – {why}" for (i, why), numbers in said.items()]


def _set_order(ranking: Ranking, columns: Sequence[Column], sort: str | None) -> None:
    """Set the order."""
    turned = sort is not None and sort.startswith("-")
    wanted = None if sort is None else sort.removeprefix("-")
    places = range(len(ranking.runs))
    if wanted in SORT_KEYS:
        facts = {i: _sort_value(ranking, i, wanted) for i in places}
        known = sorted((i for i in places if facts[i] is not None), key=lambda i: facts[i], reverse=turned)  # type: ignore[arg-type, return-value]
        ranking.sort_description = wanted
    elif wanted is None and not ranking.columns:
        known, ranking.sort_description = list(places), "the order given: no number can be compared"
    else:
        column = _default_column(ranking.columns) if wanted is None else _find_column(ranking, columns, wanted)
        numbers, reverse = column.values, column.lower_is_better == turned
        known = sorted(numbers, key=lambda i: numbers[i].value, reverse=reverse)
        ranking.sort_column, ranking.sort_description = (
            column,
            f"{ranking.heading(column)}, {'highest' if reverse else 'lowest'} first",
        )
    ranking.order = known + [i for i in places if i not in known]


def _default_column(columns: Sequence[Column]) -> Column:
    return max(columns, key=lambda each: (len(each.values), each.from_evaluation))  # the first of equals


def _find_column(ranking: Ranking, columns: Sequence[Column], name: str) -> Column:
    named = {each.name: each for each in ranking.columns}
    if name in named:
        return named[name]
    found = [each for each in columns if each.metric == name]
    shared = [each for each in found if each in ranking.columns]
    if len(shared) == 1:
        return shared[0]
    if len(found) < 2:
        known = [*dict.fromkeys(ranking.heading(each) for each in ranking.columns), *SORT_KEYS]
        raise UserError(f"sort={name}: {unknown_message('column', name, known)}")
    first, second = (shared or found)[:2]
    whose = [", ".join(ranking.runs[i].name for i in each.values) for each in (first, second)]
    choices = [f"sort={each.name}" if not each.suffix else f"'sort=\"{each.name}\"'" for each in shared]
    cure = f"give {' or '.join(choices)}" if shared else "measure them alike with pipeline=evaluate run=..."
    raise UserError(
        f"sort={name}: two protocols measured it ({whose[0]} by one, {whose[1]} by another); no column mixes them; "
        f"they differ in {describe_difference(first.protocol, second.protocol)}; {cure}"
    )


def _sort_value(ranking: Ranking, i: int, name: str) -> float | str | None:
    return ranking.parameters[i] if name == "parameters" else getattr(ranking.runs[i], name)
