"""Reads an argument `key=value` as the user meant it, where Hydra's grammar does not.

`path=epoch=12.ckpt` and `label=Food & Drink` are text to everyone but Hydra, which wants quotes of its own around it.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import grammar_parser
from omegaconf.errors import GrammarParseError

from vqf.config.settings import OPTIONS
from vqf.options.ranges import types_of
from vqf.options.typed_nodes import strip_none, type_hints_of
from vqf.registry import KINDS, components

TEXT_TYPES = {str, Path}


def quote_unreadable(arguments: Sequence[str]) -> list[str]:
    """Quote the values that Hydra cannot read and that are neither lists, mappings nor sweeps: they are text."""
    return _map_overrides(arguments, lambda line: line if parse(line) or _has_parts(line) else quoted_text(line))


def quote_text_options(arguments: Sequence[str]) -> list[str]:
    """Quote the values that Hydra would change although their options hold text.

    Examples: `run_dir=1_000` would become 1000, `label=1.10` 1.1, `path=[draft]` a list.
    """
    return _map_overrides(arguments, lambda line: quoted_text(line) if _is_changed_text(line) else line)


def parse(line: str) -> Override | None:
    """Parse an argument; None if Hydra cannot."""
    with suppress(OverrideParseException):
        return OverridesParser.create().parse_overrides([line])[0]
    return None


def quoted_text(line: str) -> str:
    """Quote the value for Hydra as one text; return a line as it is if that does not help.

    Interpolations such as `${seed}` stay; a `${` that is none is escaped.
    """
    key, equals, value = line.partition("=")
    quoted = f"{key}={hydra_quote(value)}"
    return quoted if equals and parse(quoted) else line


def hydra_quote(text: str) -> str:
    """Write a text between Hydra's double quotes."""
    try:
        grammar_parser.parse(text)
    except GrammarParseError:
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return '"' + re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + (match[2] and '\\"'), text) + '"'


def shell_word(text: str) -> str:
    """Quote a text for the shell; characters that do not print are escaped."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in escaped) + "'"


def is_text_option(key: str) -> bool:
    """Whether every option of this dotted key holds one text, and nothing else."""
    types = list(_option_types(key))
    return bool(types) and all(each in TEXT_TYPES for each in types)


def may_hold_text(key: str) -> bool:
    """Whether an option of this dotted key holds a text or a list, or is unknown."""
    types = list(_option_types(key))
    return not types or any(each in {*TEXT_TYPES, Any} for each in types)


def _option_types(key: str) -> Iterator[Any]:
    key = key.lstrip("+").replace("/", ".")
    yield from types_of(OPTIONS[key]) if key in OPTIONS else ()
    section, _, option = key.rpartition(".")
    for name, kind in KINDS.items():
        for component in components(name):
            where = "" if kind.flat else f"{kind.key}.{component.name}" if kind.multiple else kind.key
            if section == where and option in component.options:
                yield strip_none(type_hints_of(component.target).get(option))[0]


def _is_changed_text(line: str) -> bool:
    override, (key, _, text) = parse(line), line.partition("=")
    if override is None:
        return "," not in text and is_text_option(key)
    if override.is_delete() or override.is_sweep_override() or not is_text_option(key):
        return False
    value = override.value()
    if isinstance(override._value, QuotedString) or value is None or value == text:
        return False
    # What is left of Hydra's grammar: escaped characters, interpolations, and casts such as str(3).
    return not re.search(r"\\|\$\{|^\s*\w+\s*\(.*\)\s*$", text)


def _has_parts(line: str) -> bool:
    """Whether the value may be a list, a mapping, or the values of a sweep."""
    value = line.partition("=")[2].strip()
    return "," in value or value[:1] + value[-1:] in ("[]", "{}")


def _map_overrides(arguments: Sequence[str], fn: Any) -> list[str]:
    overrides = get_args_parser().parse_args(list(arguments)).overrides
    return [*arguments[: len(arguments) - len(overrides)], *map(fn, overrides)]
