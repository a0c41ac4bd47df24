"""`UserError`, and the wording of common error messages."""

import difflib
from collections.abc import Iterable

MAX_LISTED = 16  # names in one message


class UserError(ValueError):
    """A mistake of the user: one line, exit status 2, no traceback."""


class EmptySplitError(UserError):
    """A split without images."""


def quote_name(name: str) -> str:
    """Quote a file name and escape its control characters."""
    return "'" + "".join(each if each.isprintable() else ascii(each)[1:-1] for each in name) + "'"


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
