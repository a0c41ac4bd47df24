"""Names of weights, translated by a table that is read both ways."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

# What may stand in the braces of a rule.
PLACES = {
    "i": r"\d+",
    "-i": r"\d+",  # a level, counted from the other end than `{i}` counts it
    "j": r"\d+",
    "part": r"encoder|decoder",
    "qkv": r"[qkv]",
    "*": r".+",
}
ATTENDING = "{part}.mid.1."  # how vqf's names of the attention between the two middle blocks begin
LAST = "{last}"  # the second of those blocks: 2 behind an attention, 1 without


@dataclass(frozen=True)
class Rule:
    """One row of a table: their name and vqf's, with the same places in braces."""

    theirs: str
    ours: str
    matrix: bool = False  # their weight is a matrix where vqf's is a 1x1 convolution


class Table:
    """The rules of a layout for one set of names; of several rules that fit, the first counts."""

    def __init__(self, rules: Sequence[Rule], levels: int, last: int) -> None:
        self.levels = levels
        self.rules = [
            replace(rule, theirs=rule.theirs.replace(LAST, str(last)), ours=rule.ours.replace(LAST, str(last)))
            for rule in rules
        ]

    @classmethod
    def reading(cls, rules: Sequence[Rule], names: Iterable[str]) -> "Table":
        """Make the table for their names."""
        names = list(names)
        counted = [rule.theirs for rule in rules if "{-i}" in rule.theirs]
        attends = any(_matches(rule.theirs, names) for rule in rules if rule.ours.startswith(ATTENDING))
        return cls(rules, _levels(counted, names), 2 if attends else 1)

    @classmethod
    def writing(cls, rules: Sequence[Rule], names: Iterable[str]) -> "Table":
        """Make the table for vqf's names."""
        names = list(names)
        counted = [rule.ours for rule in rules if "{-i}" in rule.theirs]
        return cls(rules, _levels(counted, names), 2 if _matches("{part}.mid.2.{*}", names) else 1)

    def ours(self, name: str) -> tuple[str, Rule] | None:
        """Translate a name of theirs."""
        return next(((new, rule) for rule in self.rules if (new := self._move(name, rule.theirs, rule.ours))), None)

    def theirs(self, name: str) -> tuple[str, Rule] | None:
        """Translate a name of vqf's."""
        return next(((new, rule) for rule in self.rules if (new := self._move(name, rule.ours, rule.theirs))), None)

    def _move(self, name: str, here: str, there: str) -> str | None:
        found = match(here, name)
        if found is None:
            return None
        if ("{-i}" in here) != ("{-i}" in there):
            found["i"] = str(self.levels - 1 - int(found["i"]))
        return re.sub(r"\{(.+?)\}", lambda place: found[_group(place[1])], there)


def match(template: str, name: str) -> dict[str, str] | None:
    """Fit a name into a template; returns what stands in each of its places."""
    found = _expression(template).fullmatch(name)
    return None if found is None else found.groupdict()


def fits(template: str, name: str) -> bool:
    """Tell whether a name fits into a template."""
    return match(template, name) is not None


def inflate(tensor: Tensor, rule: Rule) -> Tensor:
    """Turn a tensor of theirs into vqf's form."""
    return tensor[..., None, None] if rule.matrix and tensor.ndim == 2 else tensor


def flatten(tensor: Tensor, rule: Rule) -> Tensor:
    """Turn a tensor of vqf's into their form."""
    return tensor.flatten(1) if rule.matrix and tensor.ndim == 4 else tensor


@cache
def _expression(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(.+?)\}", template)
    for k, part in enumerate(parts):
        parts[k] = f"(?P<{_group(part)}>{PLACES[part]})" if k % 2 else re.escape(part)
    return re.compile("".join(parts))


def _group(place: str) -> str:
    return {"-i": "i", "*": "rest"}.get(place, place)


def _matches(template: str, names: Iterable[str]) -> bool:
    return any(fits(template, name) for name in names)


def _levels(templates: Sequence[str], names: Sequence[str]) -> int:
    found = (match(template, name) for template in templates for name in names)
    return 1 + max((int(each["i"]) for each in found if each), default=-1)
