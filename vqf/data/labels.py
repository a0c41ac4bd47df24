"""Labels of images in shards, tables and folders."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from vqf.errors import UserError

log = logging.getLogger("vqf")

NumericLabels = Literal["index", "name"]

MAX_CLASSES = 1_000_000
MAX_LISTED = 5  # classes without images, in the log


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
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    label = int_or_str(label) if isinstance(label, str) else label
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise UserError(f"data.root: the label beside '{name}' is {label!r}, neither a class number nor a class name")
    if isinstance(label, int) and not 0 <= label < MAX_CLASSES:
        raise UserError(f"data.root: the label beside '{name}' is {label}, not in 0..{MAX_CLASSES - 1}")
    return label


@lru_cache(maxsize=2**16)  # the words of a table repeat; equal ones become one object
def int_or_str(label: str) -> int | str:
    """Convert a whole number of up to 9 digits, such as "3" or the "3.0" of spreadsheets, and keep other labels."""
    match = re.fullmatch(r"([0-9]{1,9})(\.0+)?", label)
    return int(match[1]) if match else label


def whole_number(label: int | str) -> int | None:
    """Return the value of a number, or of a folder's name of up to 9 digits; else None."""
    if isinstance(label, int):
        return label
    return int(label) if re.fullmatch("[0-9]{1,9}", label) else None


def class_numbers(
    labels: Iterable[int | str], names: Sequence[str] = (), numeric_labels: NumericLabels = "index"
) -> tuple[list[str], dict[int | str | None, int]]:
    """Return the class names, and the class number of every label.

    Labels that all are whole numbers are the class numbers, named by `names` if it is long enough. Otherwise, and with
    `numeric_labels="name"`, labels are numbered in order: numbers by value, then words.
    """
    values = {label: whole_number(label) for label in set(labels)}
    numbers = {label: value for label, value in values.items() if value is not None}
    if numbers and len(numbers) == len(values) and numeric_labels == "index":
        if max(numbers.values()) < MAX_CLASSES:
            return _class_names(numbers, names), dict(numbers.items())
        log.info(
            f"data.numeric_labels=index: the labels are whole numbers, but {max(numbers.values())} is too large for a "
            f"class number: the {len(numbers)} classes are numbered in order, as with data.numeric_labels=name"
        )
    ordered = sorted(values, key=lambda label: (label not in numbers, numbers.get(label, 0), str(label)))
    return [str(label) for label in ordered], {label: i for i, label in enumerate(ordered)}


def _class_names(numbers: Mapping[int | str, int], names: Sequence[str]) -> list[str]:
    """Return the name of every class number: that of `names`, or the label as it is spelled."""
    count = max(numbers.values()) + 1
    if len(names) >= count:
        return list(names)
    spelled = {value: str(label) for label, value in sorted(numbers.items(), key=str, reverse=True)}
    if missing := [str(i) for i in range(count) if i not in spelled]:
        listed = ", ".join(missing[:MAX_LISTED]) + (", ..." if len(missing) > MAX_LISTED else "")
        log.info(
            f"data.numeric_labels=index: the labels are whole numbers, which are the class numbers: {len(missing)} of "
            f"the {count} classes have no images ({listed}); data.numeric_labels=name numbers the others in order"
        )
    if shared := [value for value, uses in Counter(numbers.values()).items() if uses > 1]:
        same = " and ".join(sorted(f"'{label}'" for label, value in numbers.items() if value == min(shared)))
        log.info(
            f"data.numeric_labels=index: {len(shared)} classes have labels of several spellings, such as {same}; "
            "data.numeric_labels=name keeps them apart"
        )
    return [spelled.get(i, str(i)) for i in range(count)]
