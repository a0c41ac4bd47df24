"""Names of weights, translated by a table that is read both ways."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

# What may stand in the braces of a rule.
PLACEHOLDERS = {
    "i": r"\d+",
    "-i": r"\d+",  # a level, counted from the other end than `{i}` counts it
    "j": r"\d+",
    "part": r"encoder|decoder",
    "qkv": r"[qkv]",
    "*": r".+",
}
MIDDLE_ATTENTION = "{part}.mid.1."  # how vqf's names of the attention between the two middle blocks begin
SECOND_BLOCK = "{last}"  # the second of those blocks: 2 behind an attention, 1 without


@dataclass(frozen=True)
class KeyRule:
    """One row of a table: their name and vqf's, with the same places in braces."""

    source_key: str
    vqf_key: str
    is_linear: bool = False  # their weight is a matrix where vqf's is a 1x1 convolution


class KeyMapping:
    """The rules of a layout for one set of names; of several rules that fit, the first counts."""

    def __init__(self, rules: Sequence[KeyRule], levels: int, last: int) -> None:
        self.levels = levels
        self.rules = [
            replace(
                rule,
                source_key=rule.source_key.replace(SECOND_BLOCK, str(last)),
                vqf_key=rule.vqf_key.replace(SECOND_BLOCK, str(last)),
            )
            for rule in rules
        ]

    @classmethod
    def for_import(cls, rules: Sequence[KeyRule], names: Iterable[str]) -> "KeyMapping":
        """Make the table for their names."""
        names = list(names)
        counted = [rule.source_key for rule in rules if "{-i}" in rule.source_key]
        attends = any(
            _any_matches(rule.source_key, names) for rule in rules if rule.vqf_key.startswith(MIDDLE_ATTENTION)
        )
        return cls(rules, _count_levels(counted, names), 2 if attends else 1)

    @classmethod
    def for_export(cls, rules: Sequence[KeyRule], names: Iterable[str]) -> "KeyMapping":
        """Make the table for vqf's names."""
        names = list(names)
        counted = [rule.vqf_key for rule in rules if "{-i}" in rule.source_key]
        return cls(rules, _count_levels(counted, names), 2 if _any_matches("{part}.mid.2.{*}", names) else 1)

    def to_vqf(self, name: str) -> tuple[str, KeyRule] | None:
        """Translate a name of theirs."""
        return next(
            ((new, rule) for rule in self.rules if (new := self._translate(name, rule.source_key, rule.vqf_key))), None
        )

    def to_source(self, name: str) -> tuple[str, KeyRule] | None:
        """Translate a name of vqf's."""
        return next(
            ((new, rule) for rule in self.rules if (new := self._translate(name, rule.vqf_key, rule.source_key))), None
        )

    def _translate(self, name: str, here: str, there: str) -> str | None:
        found = parse(here, name)
        if found is None:
            return None
        if ("{-i}" in here) != ("{-i}" in there):
            found["i"] = str(self.levels - 1 - int(found["i"]))
        return re.sub(r"\{(.+?)\}", lambda place: found[_group_name(place[1])], there)


def parse(template: str, name: str) -> dict[str, str] | None:
    """Fit a name into a template; returns what stands in each of its places."""
    found = _template_regex(template).fullmatch(name)
    return None if found is None else found.groupdict()


def matches(template: str, name: str) -> bool:
    """Tell whether a name fits into a template."""
    return parse(template, name) is not None


def to_conv(tensor: Tensor, rule: KeyRule) -> Tensor:
    """Turn a tensor of theirs into vqf's form."""
    return tensor[..., None, None] if rule.is_linear and tensor.ndim == 2 else tensor


def to_linear(tensor: Tensor, rule: KeyRule) -> Tensor:
    """Turn a tensor of vqf's into their form."""
    return tensor.flatten(1) if rule.is_linear and tensor.ndim == 4 else tensor


@cache
def _template_regex(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(.+?)\}", template)
    for k, part in enumerate(parts):
        parts[k] = f"(?P<{_group_name(part)}>{PLACEHOLDERS[part]})" if k % 2 else re.escape(part)
    return re.compile("".join(parts))


def _group_name(place: str) -> str:
    return {"-i": "i", "*": "rest"}.get(place, place)


def _any_matches(template: str, names: Iterable[str]) -> bool:
    return any(matches(template, name) for name in names)


def _count_levels(templates: Sequence[str], names: Sequence[str]) -> int:
    found = (parse(template, name) for template in templates for name in names)
    return 1 + max((int(each["i"]) for each in found if each), default=-1)
