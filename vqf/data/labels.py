"""Labels of images in shards and tables."""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from vqf.errors import UserError

MAX_CLASSES = 1_000_000


def parse_label(text: str, key: str | None, name: str) -> int | str:
    """Parse a class number or name from `.cls`, or from the field `key` of `.json`.

    Raises:
        UserError: If it is missing or invalid.
    """
    try:
        label: Any = text.strip() if key is None else json.loads(text)[key]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"data.label_key={key}: no such field in the .json beside '{name}'") from error
    except ValueError as error:
        raise UserError(f"data.root: the label beside '{name}' cannot be read ({error})") from error
    label = int_or_str(label) if isinstance(label, str) else label
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise UserError(f"data.root: the label beside '{name}' is {label!r}, neither a class number nor a class name")
    if isinstance(label, int) and not 0 <= label < MAX_CLASSES:
        raise UserError(f"data.root: the label beside '{name}' is {label}, not in 0..{MAX_CLASSES - 1}")
    return label


@lru_cache(maxsize=2**16)  # the words of a table repeat; equal ones become one object
def int_or_str(label: str) -> int | str:
    """Convert a label of up to 9 digits to a number, and keep others."""
    return int(label) if re.fullmatch("[0-9]{1,9}", label) else label


def class_numbers(
    labels: Iterable[int | str], names: Sequence[str] = ()
) -> tuple[list[str], dict[int | str | None, int]]:
    """Return the class names, and the class number of every label.

    Numeric labels are the class numbers, named by `names` if it is long enough. Others are numbered in sorted order.
    """
    distinct = set(labels)
    if distinct and all(isinstance(label, int) for label in distinct):
        count = max(int(label) for label in distinct) + 1
        class_names = list(names) if len(names) >= count else [str(i) for i in range(count)]
        return class_names, {i: i for i in range(count)}
    ordered = sorted(distinct, key=str)
    return [str(label) for label in ordered], {label: i for i, label in enumerate(ordered)}
