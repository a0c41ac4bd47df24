"""Classes by name or index."""

import operator
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vqf.errors import UserError, unknown_message
from vqf.models.conversions import read
from vqf.terminal import log


def resolve_labels(
    count: int,
    classes: Sequence[str],
    label: int | str | None,
    labels: Sequence[int | str] | Tensor | None,
    first: int,
) -> Tensor:
    """The classes (count,) of the images `first`, `first + 1`, ..., by default in turn.

    Raises:
        UserError: If both are given, their number is wrong, or a class does not exist.
    """
    if label is not None and labels is not None:
        raise UserError("label and labels: both say the class; leave one out")
    if labels is not None:
        chosen = _read_labels(labels, classes)
    elif label is not None:
        chosen = torch.full((count,), class_index(label, classes))
    else:
        chosen = (torch.arange(count) + first) % max(len(classes), 1)
    if len(chosen) != count:
        raise UserError(f"labels: {len(chosen)} labels for {count} images; give one for each")
    if classes and (wrong := chosen[(chosen < 0) | (chosen >= len(classes))]).numel():
        raise UserError(f"labels: classes are numbered 0 to {len(classes) - 1}, not {int(wrong[0])}")
    return chosen


def _read_labels(labels: Any, classes: Sequence[str]) -> Tensor:
    if isinstance(labels, str) or not isinstance(labels, Iterable) or getattr(labels, "ndim", 1) == 0:
        raise UserError(f"labels={labels!r}: must be one class for each image; write label={labels!r} for one for all")
    if not isinstance(labels, Tensor):
        numbers = [class_index(each, classes) if isinstance(each, str) else _index("labels", each) for each in labels]
        return torch.tensor(numbers, dtype=torch.int64)
    given = read(labels, "labels")
    if given.is_integer and labels.ndim == 1:
        return labels.long()
    cure = ".flatten()" * (labels.ndim != 1) + ".long()" * (not given.is_integer)
    raise UserError(f"labels must be (B,) integers, not {given}; write labels{cure}")


def _index(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        cure = "; write labels=, which takes one class for each image" if isinstance(value, Iterable) else ""
        raise UserError(f"{name}={value}: must be the name or the index of a class{cure}") from None


def class_index(label: int | str, classes: Sequence[str]) -> int:
    """The index of a class by name, or else by index; a name that is a whole number is found by its value.

    Raises:
        UserError: If there is none.
    """
    label = label if isinstance(label, str) else _index("label", label)
    by_name, index = _index_by_name(str(label), classes), _whole_number(str(label))
    if by_name is not None:
        if index is not None and index != by_name and index < len(classes):
            _log_reading(str(label), classes[by_name], by_name, classes[index])
        return by_name
    if index is None:
        raise UserError(f"label={label}: {unknown_message('class', label, classes)}")
    if index not in range(len(classes)):
        raise UserError(f"label={label}: {unknown_message('class', label, range(len(classes)))}")
    return index


def _index_by_name(label: str, classes: Sequence[str]) -> int | None:
    if label in classes:
        return classes.index(label)
    number = _whole_number(label)
    return next((i for i, name in enumerate(classes) if number is not None and _whole_number(name) == number), None)


def _whole_number(name: str) -> int | None:
    return int(name) if name.isascii() and name.isdecimal() else None


@lru_cache  # every batch resolves the same label; one line is enough
def _log_reading(label: str, name: str, index: int, other: str) -> None:
    log.info(
        "label=%s: draws the class named '%s', which has index %d; the class with index %s is '%s', label=%s draws it",
        *(label, name, index, label, other, other),
    )
