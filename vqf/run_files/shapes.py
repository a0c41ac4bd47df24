"""The shapes of a run's JSON files.

A shape is a check of one value, a list with the shape of its elements, or a mapping by key, where "*" stands for all
other keys. Keys that a shape does not mention may hold anything.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Shape = Callable[[Any], bool] | Sequence[Any] | Mapping[str, Any]

MAX_INTEGER = 2**63  # so that every integer is a float as well

INVALID = object()


def is_number(value: Any) -> bool:
    """Tell whether a JSON value is a number, nan included."""
    return isinstance(value, float) or (type(value) is int and abs(value) < MAX_INTEGER)


def is_finite(value: Any) -> bool:
    """Tell whether a JSON value is a finite number."""
    return is_number(value) and math.isfinite(value)


def is_count(value: Any) -> bool:
    return is_number(value) and isinstance(value, int) and value >= 0


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_metric(value: Any) -> bool:
    """Tell whether a JSON value is a number, or stands for one that is not finite."""
    return value is None or is_number(value) or is_text(value)


def is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(end is None or is_number(end) for end in value)


def is_command(value: Any) -> bool:
    return is_text(value) or (isinstance(value, list) and all(map(is_text, value)))


SUMMARY: Shape = {
    "command": is_command,
    **dict.fromkeys(("wall_seconds", "processor_seconds"), is_finite),
    **dict.fromkeys(("processor", "accelerator", "commit"), is_text),
    **dict.fromkeys(("threads", "processes", "peak_accelerator_bytes"), is_count),
    "versions": {"*": is_text},
}
DETAILS: Shape = {  # by name of images
    "*": {
        **{key: [is_text] for key in ("captions", "labels", "names")},
        "caption": is_text,
        "counts": [is_count],
        "confusion": [[is_count]],
    }
}
METRICS: Shape = {  # of pipeline=evaluate, and tables of a training
    "protocol": {},
    "checkpoint": {"kind": is_text, "step": is_count, "sha256": is_text, "path": is_text},
    "values": {"*": lambda value: value is None or is_number(value)},
    "intervals": {"*": is_interval},
    "floors": {"*": lambda value: value is None or is_number(value)},
    "settings": {"*": {}},
    "higher_is_better": {"*": is_flag},
    "commands": [{"metrics": [is_text]}],
    "*": {"*": is_metric},
}
STATE: Shape = {"last_logged": is_count}  # of a checkpoint


def keep_valid(value: Any, shape: Shape, invalid: set[str], key: str = "") -> Any:
    """Return a JSON value without the parts that have not the shape; `INVALID` if nothing is left.

    Args:
        invalid: The dotted keys of those parts are added to it.
        key: Of the value itself.
    """
    if isinstance(shape, Mapping) and isinstance(value, dict):
        others = shape.get("*", lambda _: True)
        items = {
            name: keep_valid(item, shape.get(name, others), invalid, f"{key}.{name}" if key else name)
            for name, item in value.items()
        }
        return {name: item for name, item in items.items() if item is not INVALID}
    if isinstance(shape, Sequence) and isinstance(value, list):  # all or nothing: the places in a list have a meaning
        elements = [keep_valid(item, shape[0], invalid, key) for item in value]
        return INVALID if any(element is INVALID for element in elements) else elements
    if callable(shape) and shape(value):
        return value
    invalid.add(key)
    return INVALID
