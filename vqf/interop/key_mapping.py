"""Translates tensor names in both directions."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

# Placeholders of a rule and what they match.
PLACEHOLDERS = {
    "i": r"\d+",
    "-i": r"\d+",  # a level, counted from the opposite end of `{i}`
    "j": r"\d+",
    "part": r"encoder|decoder",
    "qkv": r"[qkv]",
    "*": r".+",
}
MIDDLE_ATTENTION = "{part}.mid.1."  # vqf's prefix of the attention between the two middle blocks
SECOND_BLOCK = "{last}"  # index of the second middle block: 2 with an attention between them, else 1


@dataclass(frozen=True)
class KeyRule:
    """Two names with the same placeholders."""

    source_key: str
    vqf_key: str
    is_linear: bool = False  # a matrix in the source, a 1x1 convolution in vqf


class KeyMapping:
    """The rules of a layout for one set of names; the first match applies.

    Args:
        levels: Resolution levels of the model, to invert `{-i}`.
        last: Index of the second middle block.
    """

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
        names = list(names)
        counted = [rule.source_key for rule in rules if "{-i}" in rule.source_key]
        attends = any(
            _any_matches(rule.source_key, names) for rule in rules if rule.vqf_key.startswith(MIDDLE_ATTENTION)
        )
        return cls(rules, _count_levels(counted, names), 2 if attends else 1)

    @classmethod
    def for_export(cls, rules: Sequence[KeyRule], names: Iterable[str]) -> "KeyMapping":
        names = list(names)
        counted = [rule.vqf_key for rule in rules if "{-i}" in rule.source_key]
        return cls(rules, _count_levels(counted, names), 2 if _any_matches("{part}.mid.2.{*}", names) else 1)

    def to_vqf(self, name: str) -> tuple[str, KeyRule] | None:
        """vqf's name and the rule for it, if any."""
        return next(
            ((new, rule) for rule in self.rules if (new := self._translate(name, rule.source_key, rule.vqf_key))), None
        )

    def to_source(self, name: str) -> tuple[str, KeyRule] | None:
        """Source name and the rule for it, if any."""
        return next(
            ((new, rule) for rule in self.rules if (new := self._translate(name, rule.vqf_key, rule.source_key))), None
        )

    def _translate(self, name: str, here: str, there: str) -> str | None:
        values = parse(here, name)
        if values is None:
            return None
        if ("{-i}" in here) != ("{-i}" in there):
            values["i"] = str(self.levels - 1 - int(values["i"]))
        return re.sub(r"\{(.+?)\}", lambda match: values[_group_name(match[1])], there)


def parse(template: str, name: str) -> dict[str, str] | None:
    """Values of a template's placeholders in a name; None without a match."""
    match = _template_regex(template).fullmatch(name)
    return None if match is None else match.groupdict()


def matches(template: str, name: str) -> bool:
    """Tell whether a name matches a template."""
    return parse(template, name) is not None


def to_conv(tensor: Tensor, rule: KeyRule) -> Tensor:
    """Reshape (out, in) to (out, in, 1, 1) by the rule."""
    return tensor[..., None, None] if rule.is_linear and tensor.ndim == 2 else tensor


def to_linear(tensor: Tensor, rule: KeyRule) -> Tensor:
    """Reshape (out, in, 1, 1) to (out, in) by the rule."""
    return tensor.flatten(1) if rule.is_linear and tensor.ndim == 4 else tensor


@cache
def _template_regex(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(.+?)\}", template)
    for k, part in enumerate(parts):
        parts[k] = f"(?P<{_group_name(part)}>{PLACEHOLDERS[part]})" if k % 2 else re.escape(part)
    return re.compile("".join(parts))


def _group_name(placeholder: str) -> str:
    return {"-i": "i", "*": "rest"}.get(placeholder, placeholder)


def _any_matches(template: str, names: Iterable[str]) -> bool:
    return any(matches(template, name) for name in names)


def _count_levels(templates: Sequence[str], names: Sequence[str]) -> int:
    parsed = (parse(template, name) for template in templates for name in names)
    return 1 + max((int(values["i"]) for values in parsed if values), default=-1)
