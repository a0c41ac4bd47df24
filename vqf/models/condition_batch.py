"""What a generator is told of the pictures that it draws, brought to a size that its codes fill."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.batch import Batch, Size
from vqf.errors import UserError
from vqf.models.conditioning import Conditions
from vqf.protocols import Conditioner


def picture_fields(conditioner: Conditions) -> dict[str, str]:
    """Return, for every conditioner that is told by a picture, the field of a batch that holds it."""
    return {name: _field(each) for name, each in conditioner.parts.items() if hasattr(each, "channels")}


def fields(conditioner: Conditions) -> set[str]:
    """Return the fields of a batch that differ from picture to picture by more than a class."""
    found = set(picture_fields(conditioner).values())
    return found | {each.field for each in conditioner.parts.values() if hasattr(each, "field")}


def gather(conditions: Tensor | Batch | None, conditioner: Conditions, count: int) -> Batch:
    """Return what the conditioners read of what a caller gives, a row for each of `count` pictures.

    Args:
        conditions: Pictures (count, C, H, W), or (C, H, W) for all, of the one conditioner that is told by pictures; or
            a batch with a row for each, or one for all, and whatever each of them reads.
        conditioner: All of them.
        count: Of the pictures to draw.

    Raises:
        UserError: If one of them goes without its picture, or has one of other channels.
    """
    wanted = picture_fields(conditioner)
    told = _of_pictures(conditions, wanted) if isinstance(conditions, Tensor) else conditions or Batch()
    for name, field in wanted.items():
        if name not in told.codes:
            _check_picture(name, field, getattr(told, field), conditioner.parts[name])
    kept = {field: getattr(told, field) for field in {*wanted.values(), "labels", "places"}}
    told = Batch(**kept, codes=told.codes)
    rows = {len(each) for each in (*kept.values(), *told.codes.values()) if each is not None}
    if rows - {1, count}:
        raise UserError(f"conditions: {max(rows - {1, count})} of them for {count} pictures")
    return told.map(lambda each: each.expand(count, *each.shape[1:]))


def size_of(told: Batch) -> Size | None:
    """Return the height and width of the pictures in a batch, None where there are none.

    Raises:
        UserError: If they differ.
    """
    sizes = {(each.shape[-2], each.shape[-1]) for each in (told.images, told.conditions) if each is not None}
    if len(sizes) > 1:
        both = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise UserError(f"conditions: pictures of {both} pixels cannot be of the same place; scale them to one size")
    return next(iter(sizes), None)


def enlarged(told: Batch, size: Size, wanted: Size) -> Batch:
    """Return the batch with its pictures of `size` continued by their right and lower edges up to the size `wanted`.

    What they show stays where it was, in pixels, and so do the places that were said.
    """
    if size == wanted:
        return told
    below, right = wanted[0] - size[0], wanted[1] - size[1]

    def continued(pictures: Tensor | None) -> Tensor | None:
        return None if pictures is None else F.pad(pictures, (0, right, 0, below), mode="replicate")

    places = told.places
    if places is not None:
        growth = torch.tensor([wanted[0] / size[0], wanted[1] / size[1]], device=places.device)
        places = torch.cat([places[:, :2], places[:, :2] + (places[:, 2:] - places[:, :2]) * growth], dim=1)
    return replace(told, images=continued(told.images), conditions=continued(told.conditions), places=places)


def _field(conditioner: Conditioner) -> str:
    return getattr(conditioner, "field", "conditions")


def _of_pictures(pictures: Tensor, wanted: Mapping[str, str]) -> Batch:
    found = set(wanted.values())
    if not found:
        raise UserError("conditions: this prior was not trained on maps or pictures; label= may choose a class")
    if len(found) > 1:
        names = " and ".join(f"'{name}' reads {field}" for name, field in wanted.items())
        raise UserError(f"conditions: of several conditioners each wants a picture, {names}; give each its own")
    one: dict[str, Any] = {found.pop(): pictures.reshape(-1, *pictures.shape[-3:])}
    return replace(Batch(), **one)


def _check_picture(name: str, field: str, pictures: Tensor | None, conditioner: Conditioner) -> None:
    if pictures is None:
        what = "a picture to look at" if field == "images" else "a map"
        raise UserError(f"conditioner '{name}' needs {what}, and the picture is as large as that; condition= gives one")
    channels: int = conditioner.channels  # type: ignore[attr-defined]
    if pictures.shape[1] != channels:
        raise UserError(
            f"conditioner '{name}' was trained on pictures of {channels} channels, not of {pictures.shape[1]}; "
            "data.maps and data.labels say how a map is read"
        )
