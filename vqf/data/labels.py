"""The labels of samples in shards, and the names of their classes."""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from vqf.errors import UserError

MAX_CLASSES = 1_000_000


def parse_label(text: str, key: str | None, name: str) -> int | str:
    """Return the label that a `.cls` holds, or a field of a `.json`: a number, or the name of a class.

    Raises:
        UserError: If it has none, or one that cannot be.
    """
    try:
        label: Any = text.strip() if key is None else json.loads(text)[key]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"data.label_key={key}: no such field in the .json beside '{name}'") from error
    except ValueError as error:
        raise UserError(f"data.root: the label beside '{name}' cannot be read ({error})") from error
    label = parse(label) if isinstance(label, str) else label
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise UserError(f"data.root: the label beside '{name}' is {label!r}, neither a number nor a word")
    if isinstance(label, int) and not 0 <= label < MAX_CLASSES:
        raise UserError(f"data.root: the label beside '{name}' is {label}, not a number from 0 on")
    return label


@lru_cache(maxsize=2**16)
def parse(label: str) -> int | str:
    """Read a label: a number, if it is one, or a word."""
    return int(label) if re.fullmatch("[0-9]{1,9}", label) else label


def class_numbers(
    labels: Iterable[int | str], names: Sequence[str] = ()
) -> tuple[list[str], dict[int | str | None, int]]:
    """Return the names of the classes, and the number of each label; nothing where there are no labels.

    Numbers stay what they are, and are named by `names` if there are enough; words are counted in their order.
    """
    found = set(labels)
    if found and all(isinstance(each, int) for each in found):
        count = max(int(each) for each in found) + 1
        named = list(names) if len(names) >= count else [str(i) for i in range(count)]
        return named, {i: i for i in range(count)}
    ordered = sorted(found, key=str)
    return [str(each) for each in ordered], {each: i for i, each in enumerate(ordered)}
