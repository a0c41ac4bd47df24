"""`UserError`, and the wording of common error messages."""

import difflib
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

MAX_LISTED = 16  # names in one message

# Control characters, line separators, bidirectional controls (CVE-2021-42574), and bytes that are not UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    r"""Escape characters that change what a terminal or page shows: "\x1b[31m", "\n", "\u202e".

    Args:
        keep: Characters to leave as they are, such as the line ends of a text of several lines.
    """
    return UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


class UserError(ValueError):
    """Mistakes of the user: exit status 2, no traceback.

    Args:
        *lines: One for each mistake. Names in them may be anybody's: `str` gives one printable line for each.
    """

    def __str__(self) -> str:
        return "\n".join(printable(str(line)) for line in self.args)


class EmptySplitError(UserError):
    """A split without images."""


def quote_name(name: str) -> str:
    """Quote a file name, in its printable form."""
    return f"'{printable(name)}'"


def not_a_run_message(path: Path) -> str:
    """Message for a file where a run's folder is needed: what turns a checkpoint of another project into a run."""
    if (path.parent / "manifest.json").is_file():
        return f"a file of a checkpoint; give the folder, {path.parent}"
    return (
        "a file, and this needs the folder of a run; a checkpoint of another project becomes one with "
        f"{import_command(path)}"
    )


def import_command(path: Path) -> str:
    """The command that turns a checkpoint of another project into a run."""
    argument, folder = shlex.quote(f"path={path}"), shlex.quote(f"run_dir=runs/{path.stem}")
    return f"python -m vqf.run pipeline=import {argument} {folder}"


def name_first(names: Sequence[str]) -> str:
    """Name the first of many: "'encoder.weight' and 41 more"."""
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def closest_match(name: str, known: Iterable[object]) -> str | None:
    """The most similar known name; None if none is similar."""
    close = difflib.get_close_matches(name, [str(item) for item in known], n=1)
    return close[0] if close else None


def unknown_message(what: str, name: object, known: Iterable[object]) -> str:
    """Message for an unknown name: "unknown quantizer 'vqq'. Did you mean 'vq'? Known: ema, vq."."""
    names = [str(item) for item in known]
    close = closest_match(str(name), names)
    hint = f" Did you mean '{close}'?" if close else ""
    return f"unknown {what} '{name}'.{hint} Known: {', '.join(names) or 'none'}."


def unknown_key_message(config_key: str, known: Iterable[str]) -> str:
    """Message for an unknown dotted key, with its first wrong part."""
    known, prefix, rest = list(known), "", config_key.split(".")
    while any(key.startswith(f"{prefix}{rest[0]}.") for key in known) and len(rest) > 1:
        prefix += f"{rest.pop(0)}."
    siblings = sorted({key.removeprefix(prefix).split(".")[0] for key in known if key.startswith(prefix)})
    group = f" in {prefix[:-1]}" if prefix else ""
    close = closest_match(rest[0], siblings)
    if close is None and config_key == rest[0]:  # codebook_size=512 without model.quantizer in front
        close = min((key for key in known if key.rpartition(".")[2] == config_key), key=len, default=None)
    hint = f" Did you mean '{close}'?" if close else ""
    many = len(siblings) > MAX_LISTED
    names = "python -m vqf.run --help lists them" if many else f"Known: {', '.join(siblings)}"
    return f"unknown option '{rest[0]}'{group}.{hint} {names}."
