"""Validation of a sampling call."""

import inspect
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from vqf.batch import Size, pair
from vqf.errors import UserError, unknown_message
from vqf.models.condition_batch import per_image_fields
from vqf.models.conditioning import ConditionerStack
from vqf.protocols import Sampler
from vqf.terminal import log


def class_index(label: int | str, classes: Sequence[str]) -> int:
    """The index of a class by name, or else by index; a name that is a whole number is found by its value.

    Raises:
        UserError: If there is none.
    """
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


def resolve_labels(
    count: int,
    classes: Sequence[str],
    label: int | str | None,
    labels: Sequence[int] | Tensor | None,
    first: int,
) -> Tensor:
    """The classes (count,) of the images `first`, `first + 1`, ..., by default in turn.

    Raises:
        UserError: If their number is wrong, or a class does not exist.
    """
    if labels is not None:
        chosen = torch.as_tensor(labels)
    elif label is not None:
        chosen = torch.full((count,), class_index(label, classes))
    else:
        chosen = (torch.arange(count) + first) % max(len(classes), 1)
    if len(chosen) != count:
        raise UserError(f"labels: {len(chosen)} labels for {count} images")
    if classes and (chosen.min() < 0 or chosen.max() >= len(classes)):
        raise UserError(f"labels: classes are numbered 0 to {len(classes) - 1}")
    return chosen


def grid_for_size(size: int | Sequence[int], stride: int) -> Size:
    """Rows and columns of cells of an image of `size` pixels.

    Raises:
        UserError: If the stride does not divide it.
    """
    height, width = _read_size(size)
    if height % stride or width % stride:
        near = [max(round(each / stride), 1) * stride for each in (height, width)]
        raise UserError(
            f"size=[{height},{width}]: the tokenizer's stride {stride} must divide it; "
            f"the nearest that fits is size=[{near[0]},{near[1]}]"
        )
    return height // stride, width // stride


def known_token_mask(mask: Tensor, indices: Tensor, stride: int) -> Tensor:
    """Which tokens (B, h, w) are known: those whose pixels all are.

    Args:
        mask: True where known: (h, w) in tokens or (H, W) in pixels, with or without a batch dimension.

    Raises:
        ValueError: If the mask has another shape.
    """
    height, width = indices.shape[1:]
    mask = mask.to(indices.device, torch.bool).expand(len(indices), *mask.shape[-2:])
    if mask.shape[1:] == (height * stride, width * stride):
        return mask.unflatten(2, (width, stride)).unflatten(1, (height, stride)).all(dim=4).all(dim=2)
    if mask.shape[1:] != (height, width):
        raise ValueError(
            f"the mask must be ({height}, {width}) in tokens or ({height * stride}, {width * stride}) in pixels, "
            f"not {tuple(mask.shape[1:])}"
        )
    return mask


def check_sampler(
    sampler: Sampler, conditioner: ConditionerStack, grid: Size, trained_grid: Size, stride: int, keeps_known: bool
) -> None:
    """Check that a sampler can sample a grid and keep known tokens.

    Raises:
        UserError: If it cannot.
    """
    accepted, window = inspect.signature(sampler).parameters, getattr(sampler, "window", None)
    if window not in (None, trained_grid) and (fields := per_image_fields(conditioner)):
        raise UserError(
            f"sampler.window=[{window[0]},{window[1]}]: this prior reads {', '.join(sorted(fields))} of windows of "
            f"{trained_grid[0]} x {trained_grid[1]} tokens, as in training; leave sampler.window out"
        )
    if keeps_known and "known" not in accepted:
        raise UserError("sampler: this one cannot keep known tokens; sampler=autoregressive does")
    # The tokens of fewer rows are the start of a trained sequence; those of other columns are not.
    if "window" not in accepted and (grid[1] != trained_grid[1] or grid[0] > trained_grid[0]):
        requested, trained = (f"{each[0] * stride} x {each[1] * stride}" for each in (grid, trained_grid))
        raise UserError(
            f"size: the prior was trained on images of {trained} pixels, not {requested}; "
            "sampler=sliding_window samples larger ones"
        )


def _read_size(size: int | Sequence[int]) -> Size:
    try:
        height, width = pair(size)
    except (TypeError, ValueError) as error:
        raise UserError(f"size={size}: must be one number, or height and width as size=[512,768]") from error
    if height < 1 or width < 1:
        raise UserError(f"size=[{height},{width}]: height and width must be at least 1")
    return height, width
