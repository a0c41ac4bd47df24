"""What a caller asks of a generator, in numbers: classes, sizes, and which codes are known."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vqf.batch import Size, pair
from vqf.errors import UserError, unknown_message


def class_index(label: int | str, classes: Sequence[str]) -> int:
    """Return the number of a class given by number or name.

    Raises:
        UserError: If there is no such class.
    """
    if isinstance(label, int) or str(label).isdigit():
        if int(label) not in range(len(classes)):
            raise UserError(f"label={label}: {unknown_message('class', label, range(len(classes)))}")
        return int(label)
    if label not in classes:
        raise UserError(f"label={label}: {unknown_message('class', label, classes)}")
    return classes.index(label)


def resolve_labels(
    count: int,
    classes: Sequence[str],
    label: int | str | None,
    labels: Sequence[int] | Tensor | None,
    first: int,
) -> Tensor:
    """Return the class of each of `count` images, the first of which has the number `first`: they take turns.

    Args:
        count: Of the images.
        classes: All names.
        label: One class for all of them instead, by number or name.
        labels: A class for each instead.
        first: The number of the first image.

    Raises:
        UserError: If there are too few or too many, or one that does not exist.
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
    """Return rows and columns of codes of an image of a size in pixels, one number for both sides or two.

    Raises:
        UserError: If it is no size, or not one that the stride divides.
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
    """Return which codes (B, h, w) are known, from a mask of pixels or of codes, with a batch or for all images.

    Raises:
        ValueError: If the mask has another shape.
    """
    height, width = indices.shape[1:]
    mask = mask.to(indices.device, torch.bool).expand(len(indices), *mask.shape[-2:])
    if mask.shape[1:] == (height * stride, width * stride):
        return mask.unflatten(2, (width, stride)).unflatten(1, (height, stride)).all(dim=4).all(dim=2)
    if mask.shape[1:] != (height, width):
        raise ValueError(
            f"the mask must be ({height}, {width}) in codes or ({height * stride}, {width * stride}) in pixels, "
            f"not {tuple(mask.shape[1:])}"
        )
    return mask


def _read_size(size: int | Sequence[int]) -> Size:
    try:
        height, width = pair(size)
    except (TypeError, ValueError) as error:
        raise UserError(f"size={size}: give one number, or two as size=[512,768]") from error
    if height < 1 or width < 1:
        raise UserError(f"size=[{height},{width}]: an image has at least one pixel")
    return height, width
