"""Mistakes of the person at the keyboard, and the words for them."""

import difflib
from collections.abc import Iterable

MAX_LISTED = 16  # names that fit into a line


class UserError(ValueError):
    """A mistake in what the user asked for: shown as one line, exit status 2, without a traceback."""


class EmptySplitError(UserError):
    """A part of a data source that has no image, and that a pipeline for both parts goes without."""


def quote_name(name: str) -> str:
    """Quote a name that a file may have: what would begin another line, or move the cursor, is written out."""
    return "'" + "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name) + "'"


def closest_match(name: str, known: Iterable[object]) -> str | None:
    """Return the known name that `name` was probably meant to be."""
    close = difflib.get_close_matches(name, [str(item) for item in known], n=1)
    return close[0] if close else None


def unknown_message(what: str, name: object, known: Iterable[object]) -> str:
    """Word the mistake of naming something that does not exist."""
    words = [str(item) for item in known]
    close = closest_match(str(name), words)
    hint = f" Did you mean '{close}'?" if close else ""
    return f"unknown {what} '{name}'.{hint} Known: {', '.join(words) or 'none'}."


def unknown_key_message(config_key: str, known: Iterable[str]) -> str:
    """Word the mistake of a dotted key that is not among the known ones."""
    known, before, parts = list(known), "", config_key.split(".")
    while any(each.startswith(f"{before}{parts[0]}.") for each in known) and len(parts) > 1:
        before += f"{parts.pop(0)}."
    siblings = sorted({each.removeprefix(before).split(".")[0] for each in known if each.startswith(before)})
    inside = f" in {before[:-1]}" if before else ""
    close = closest_match(parts[0], siblings)
    if close is None and config_key == parts[0]:  # codebook_size=512, without the place of its component
        close = min((each for each in known if each.rpartition(".")[2] == config_key), key=len, default=None)
    hint = f" Did you mean '{close}'?" if close else ""
    many = len(siblings) > MAX_LISTED
    names = "python -m vqf.run --help lists them" if many else f"Known: {', '.join(siblings)}"
    return f"unknown word '{parts[0]}'{inside}.{hint} {names}."
