"""One table over runs, in which no column holds numbers of two protocols."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vqf.config.diff import differing
from vqf.errors import UserError, unknown
from vqf.evaluation.protocols import digest
from vqf.pipelines.comparison.metrics import Number
from vqf.pipelines.comparison.runs import Run

# Numbers of which less is better where their metrics do not say; of all others more is.
LOWER = re.compile(r"(^|_)[rg]?fi?d(_|$)|^k[id]d?(_|$)|lpips|perceptual|nats|loss|^l[12]$|mse|error|^dead$")

FACTS = ("name", "step", "seconds", "processor_seconds", "parameters")  # that a table can be sorted by as well
OF_ONE = ("metric.", "tokenizer")  # how lines begin that are not the protocol's but a single number's


@dataclass
class Column:
    """A metric by one protocol, and its numbers by run."""

    metric: str
    lines: Mapping[str, str]
    numbers: dict[int, Number]  # by the run's place in the list
    label: str = ""  # of the protocol
    own: str = ""  # what tells it from others of this metric and protocol

    @property
    def name(self) -> str:
        """What it is called where it could be taken for another."""
        return f"{self.label}/{self.metric}{self.own}"

    @property
    def lower(self) -> bool:
        """Whether less is better: as the metric says, or its name."""
        said = [each.higher_is_better for each in self.numbers.values() if each.higher_is_better is not None]
        return not said[0] if said else bool(LOWER.search(self.metric))

    @property
    def best(self) -> float:
        """The best of its values."""
        values = [number.value for number in self.numbers.values()]
        return min(values) if self.lower else max(values)

    @property
    def evaluated(self) -> bool:
        """Whether pipeline=evaluate gave the numbers."""
        return next(iter(self.numbers.values())).evaluated


@dataclass
class Ranking:
    """Runs, best first, and what can be said of them.

    Attributes:
        order: Places of runs in the list, best first.
        columns: Metrics by protocol, each with the numbers of at least two runs, if there are two.
        options: Those in which the runs differ, with their values in the order of the list.
        apart: A sentence for all numbers that no other run's can be compared with.
        sort: What it is sorted by, in words.
        by: The column that it is sorted by, if it is one.
        protocols: By label, the lines that all columns of a protocol share.
    """

    runs: Sequence[Run]
    parameters: Sequence[int | None]
    order: list[int]
    columns: list[Column]
    options: dict[str, list[str]]
    apart: list[str]
    sort: str
    protocols: dict[str, Mapping[str, str]] = field(default_factory=dict)
    by: Column | None = None

    def heading(self, column: Column) -> str:
        """Name a column as shortly as it can be told from the others."""
        twice = sum(each.metric == column.metric for each in self.columns) > 1
        return column.name if twice else column.metric

    def differences(self) -> list[str]:
        """Say why a metric has several columns: in which lines each differs from the first of them."""
        first: dict[str, Column] = {}
        said = []
        for each in self.columns:
            other = first.setdefault(each.metric, each)
            if other is not each:
                names = [f"{one.label}{one.own}" for one in (other, each)]
                said.append(f"{names[0]} and {names[1]} differ in {tell(other.lines, each.lines)}")
        return list(dict.fromkeys(said))


def rank(runs: Sequence[Run], parameters: Sequence[int | None], sort: str | None) -> Ranking:
    """Put runs into one table.

    Args:
        runs: In any order.
        parameters: Of each, if known.
        sort: A metric, `protocol/metric` where several protocols measured it, or one of `FACTS`; by default the first
            metric of the protocol that most runs share. A minus in front turns the order round.

    Raises:
        UserError: If there is no such column, or if it would hold numbers of two protocols.
    """
    columns = _columns(runs)
    shared = [each for each in columns if len(each.numbers) > 1 or len(runs) == 1]
    protocols = _label(shared)
    ranking = Ranking(runs, parameters, [], shared, differing([run.config for run in runs]), [], "", protocols)
    ranking.apart = _apart(runs, [each for each in columns if each not in shared], columns)
    _sort(ranking, columns, sort)
    return ranking


def tell(first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """Say which lines of two protocols differ."""
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    return "; ".join(f"{key}: {first.get(key, 'none')} and {second.get(key, 'none')}" for key in keys)


def _columns(runs: Sequence[Run]) -> list[Column]:
    """Return a column for every metric and protocol; looks of a training only where a run has no evaluation."""
    everywhere = all(any(each.evaluated for found in run.numbers.values() for each in found) for run in runs)
    columns: dict[tuple[str, str], Column] = {}
    for i, run in enumerate(runs):
        for metric, found in run.numbers.items():
            for number in found:
                if number.evaluated or not everywhere:
                    key = metric, digest(number.lines)
                    columns.setdefault(key, Column(metric, number.lines, {})).numbers[i] = number
    return sorted(columns.values(), key=lambda each: not each.evaluated)


def _label(columns: Sequence[Column]) -> dict[str, Mapping[str, str]]:
    """Name the protocols of columns; what only one number depends on does not make another protocol."""
    groups: dict[str, list[Column]] = {}
    for column in columns:
        groups.setdefault(digest(_common(column.lines)), []).append(column)
    names = [_common(group[0].lines).get("name", "unnamed") for group in groups.values()]
    for name, (mark, group) in zip(names, groups.items(), strict=True):
        known = next((each.hash for column in group for each in column.numbers.values() if each.hash), mark)
        for column in group:
            column.label = name if names.count(name) == 1 else f"{name}-{known[:8]}"
            column.own = _own(column, [each for each in group if each.metric == column.metric])
    return {group[0].label: _common(group[0].lines) for group in groups.values()}


def _common(lines: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in lines.items() if not key.startswith(OF_ONE)}


def _own(column: Column, alike: Sequence[Column]) -> str:
    """Word what tells a column from others of its metric and protocol; empty where it is the only one."""
    differ = [key for key, value in column.lines.items() if any(each.lines.get(key) != value for each in alike)]
    return f" ({', '.join(f'{key} {column.lines[key]}' for key in differ)})" if differ else ""


def _apart(runs: Sequence[Run], lone: Sequence[Column], columns: Sequence[Column]) -> list[str]:
    """Say of every run which of its numbers stand alone, and which line keeps them apart."""
    said: dict[tuple[int, str], list[str]] = {}
    for column in lone:
        ((i, number),) = column.numbers.items()
        others = [each for each in columns if each.metric == column.metric and each is not column]
        if others:
            other = others[0]
            whose = ", ".join(runs[j].name for j in other.numbers)
            why = f"cannot stand in one column with {whose}: {tell(column.lines, other.lines)}"
        else:
            why = "no other run has it" if len(runs) > 1 else ""
        said.setdefault((i, why), []).append(f"{column.metric} {number.value:.4g}")
    return [f"{runs[i].name}: {', '.join(numbers)} – {why}" for (i, why), numbers in said.items()]


def _sort(ranking: Ranking, columns: Sequence[Column], sort: str | None) -> None:
    """Set the order."""
    turned = sort is not None and sort.startswith("-")
    wanted = None if sort is None else sort.removeprefix("-")
    places = range(len(ranking.runs))
    if wanted in FACTS:
        facts = {i: _fact(ranking, i, wanted) for i in places}
        known = sorted((i for i in places if facts[i] is not None), key=lambda i: facts[i], reverse=turned)  # type: ignore[arg-type, return-value]
        ranking.sort = wanted
    elif wanted is None and not ranking.columns:
        known, ranking.sort = list(places), "the order given: no number can be compared"
    else:
        column = _default(ranking.columns) if wanted is None else _find(ranking, columns, wanted)
        numbers, reverse = column.numbers, column.lower == turned
        known = sorted(numbers, key=lambda i: numbers[i].value, reverse=reverse)
        ranking.by, ranking.sort = column, f"{ranking.heading(column)}, {'highest' if reverse else 'lowest'} first"
    ranking.order = known + [i for i in places if i not in known]


def _default(columns: Sequence[Column]) -> Column:
    return max(columns, key=lambda each: (len(each.numbers), each.evaluated))  # the first of equals


def _find(ranking: Ranking, columns: Sequence[Column], wanted: str) -> Column:
    named = {each.name: each for each in ranking.columns}
    if wanted in named:
        return named[wanted]
    found = [each for each in columns if each.metric == wanted]
    shared = [each for each in found if each in ranking.columns]
    if len(shared) == 1:
        return shared[0]
    if len(found) < 2:
        known = [*dict.fromkeys(ranking.heading(each) for each in ranking.columns), *FACTS]
        raise UserError(f"sort={wanted}: {unknown('column', wanted, known)}")
    first, second = (shared or found)[:2]
    whose = [", ".join(ranking.runs[i].name for i in each.numbers) for each in (first, second)]
    choices = [f"sort={each.name}" if not each.own else f"'sort=\"{each.name}\"'" for each in shared]
    cure = f"give {' or '.join(choices)}" if shared else "measure them alike with pipeline=evaluate run=..."
    raise UserError(
        f"sort={wanted}: two protocols measured it ({whose[0]} by one, {whose[1]} by another); no column mixes them; "
        f"they differ in {tell(first.lines, second.lines)}; {cure}"
    )


def _fact(ranking: Ranking, i: int, name: str) -> float | str | None:
    return ranking.parameters[i] if name == "parameters" else getattr(ranking.runs[i], name)
