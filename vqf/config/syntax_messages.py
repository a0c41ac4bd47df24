"""Messages for arguments that Hydra cannot read, each with the whole argument as one types it in a shell."""

import re
from collections.abc import Iterator, Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from vqf.config.arguments import hydra_quote, is_text_option, may_hold_text, parse, quoted_text, shell_word
from vqf.errors import closest_match


def rejoin_split(lines: Sequence[str]) -> Iterator[list[str]]:
    """Group arguments that the shell has split at spaces, as [sizes=[8,] [5]]; all others stay alone."""
    rest = list(lines)
    while rest:
        count = next((n for n in range(1, len(rest) + 1) if _is_whole(rest[:n])), 1)
        yield rest[:count]
        rest = rest[count:]


def split_hint(lines: Sequence[str]) -> str:
    """Message for one argument that the shell has split."""
    return f"{' '.join(lines)}: the shell splits it at spaces; type {shell_word(' '.join(lines))}"


def syntax_hint(line: str, before: str | None, choices: Mapping[str, str], multirun: bool) -> str:
    """Message for an argument that Hydra cannot parse.

    Args:
        before: The argument before it.
        choices: As {"quickstart": "experiment=quickstart"}.
    """
    key, equals, value = line.partition("=")
    if not equals:
        return f"{line}: an argument has the form key=value. {_form_hint(line, before, choices)}"
    if "." in key and "/" in key:
        cure = shell_word(f"{key.replace('/', '.')}={value}")
        return f"{line}: a slash chooses a component, a dot sets an option: write {cure}"
    if not parse(f"{key}=x"):
        return f"{line}: '{key}' is not the name of an option; python -m vqf.run --help lists them"
    cures = list(_cures(key, value, multirun))
    return f"{line}: cannot be read ({_reason(line)})" + "".join(f"; {each}" for each in cures)


def sweep_hint(override: Override) -> str:
    """Message for several values without `-m`."""
    key, value = override.get_key_element(), override.get_value_string()
    cure = f"write a list as {shell_word(f'{key}=[{value}]')}"
    if is_text_option(key):
        cure = f"as one text, type {shell_word(quoted_text(f'{key}={value}'))}"
    return f"{key}={value}: several values are a sweep, which needs -m; {cure}"


def _is_whole(lines: Sequence[str]) -> bool:
    """Whether arguments are one with its brackets closed, or cannot be the beginning of it."""
    first, last = lines[0], lines[-1]
    if len(lines) > 1 and "=" in last:
        return False
    return parse(" ".join(lines)) is not None and (len(lines) == 1 or parse(first) is None)


def _form_hint(line: str, before: str | None, choices: Mapping[str, str]) -> str:
    close = closest_match(line, choices)
    hint = f"Did you mean {choices[close]}? " if close else ""
    if not close and before and is_text_option(before.partition("=")[0]):
        hint = f"If it belongs to the one before it, type {shell_word(f'{before} {line}')}. "
    return f"{hint}A flag begins with --, as in --help."


def _cures(key: str, value: str, multirun: bool) -> Iterator[str]:
    kind = {"[]": "list", "{}": "mapping"}.get(value[:1] + value[-1:])
    if kind and not is_text_option(key):
        cure = f"{key}={value[0]}{_quoted_parts(value[1:-1])}{value[-1]}"
        yield from [f"as a {kind}, type {shell_word(cure)}"] if parse(cure) else []
    if "," in value and multirun and parse(sweep := f"{key}={_quoted_parts(value)}"):
        yield f"as the values of a sweep, type {shell_word(sweep)}"
    if may_hold_text(key) and parse(text := quoted_text(f"{key}={value}")):
        yield f"as one text, type {shell_word(text)}"


def _quoted_parts(value: str) -> str:
    parts = re.findall(r"""(?:"(?:\\.|[^"])*"|'(?:\\.|[^'])*'|[^,])+""", value)  # at commas that are not in quotes
    return ",".join(_quoted_part(part.strip()) for part in parts)


def _quoted_part(part: str) -> str:
    if parse(f"x=[{part}]") or parse(f"x={{{part}}}"):
        return part
    if name := re.match(r"\w+:", part):  # of a mapping
        return name[0] + hydra_quote(part[name.end() :].strip())
    return hydra_quote(part)


def _reason(line: str) -> str:
    try:
        OverridesParser.create().parse_overrides([line])
    except OverrideParseException as error:
        text = error.message.partition("\nSee")[0]
        if match := re.search(r"\n( *)\^", text):  # below the character
            return f"{text[len(match[1])]!r} needs quotes"
        if match := re.search(r"(?:mismatched|extraneous) input '(.+)' expecting", text):
            return f"{match[1]!r} needs quotes"
        if "Unknown function" in text:
            return text.partition("': ")[2].strip().replace("\n", ". ")
    is_open = any(line.count(opening) > line.count(closing) for opening, closing in ("[]", "{}", "()"))
    return "a bracket is open" if is_open else "not one value"
