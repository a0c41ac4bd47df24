"""What a generator is told of the images that it draws, brought to a size that its codes fill."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.batch import Batch, Size
from vqf.errors import UserError
from vqf.models.conditioning import ConditionerStack
from vqf.protocols import Conditioner


def image_fields(conditioner: ConditionerStack) -> dict[str, str]:
    """Return, for every conditioner that is told by an image, the field of a batch that holds it."""
    return {name: _batch_field(each) for name, each in conditioner.conditioners.items() if hasattr(each, "channels")}


def per_image_fields(conditioner: ConditionerStack) -> set[str]:
    """Return the fields of a batch that differ from image to image by more than a class."""
    found = set(image_fields(conditioner).values())
    return found | {each.batch_field for each in conditioner.conditioners.values() if hasattr(each, "batch_field")}


def condition_batch(conditions: Tensor | Batch | None, conditioner: ConditionerStack, count: int) -> Batch:
    """Return what the conditioners read of what a caller gives, a row for each of `count` images.

    Args:
        conditions: Images (count, C, H, W), or (C, H, W) for all, of the one conditioner that is told by images; or
            a batch with a row for each, or one for all, and whatever each of them reads.
        conditioner: All of them.
        count: Of the images to draw.

    Raises:
        UserError: If one of them goes without its image, or has one of other channels.
    """
    wanted = image_fields(conditioner)
    told = _batch_from_images(conditions, wanted) if isinstance(conditions, Tensor) else conditions or Batch()
    for name, field in wanted.items():
        if name not in told.condition_indices:
            _check_condition_image(name, field, getattr(told, field), conditioner.conditioners[name])
    kept = {field: getattr(told, field) for field in {*wanted.values(), "labels", "crop_boxes"}}
    told = Batch(**kept, condition_indices=told.condition_indices)
    rows = {len(each) for each in (*kept.values(), *told.condition_indices.values()) if each is not None}
    if rows - {1, count}:
        raise UserError(f"conditions: {max(rows - {1, count})} of them for {count} images")
    return told.map(lambda each: each.expand(count, *each.shape[1:]))


def condition_image_size(batch: Batch) -> Size | None:
    """Return the height and width of the images in a batch, None where there are none.

    Raises:
        UserError: If they differ.
    """
    sizes = {(each.shape[-2], each.shape[-1]) for each in (batch.images, batch.conditions) if each is not None}
    if len(sizes) > 1:
        both = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise UserError(f"conditions: images of {both} pixels cannot be of the same place; scale them to one size")
    return next(iter(sizes), None)


def pad_to(batch: Batch, size: Size, target: Size) -> Batch:
    """Return the batch with its images of `size` continued by their right and lower edges up to the size `target`.

    What they show stays where it was, in pixels, and so do the places that were said.
    """
    if size == target:
        return batch
    below, right = target[0] - size[0], target[1] - size[1]

    def continued(images: Tensor | None) -> Tensor | None:
        return None if images is None else F.pad(images, (0, right, 0, below), mode="replicate")

    places = batch.crop_boxes
    if places is not None:
        growth = torch.tensor([target[0] / size[0], target[1] / size[1]], device=places.device)
        places = torch.cat([places[:, :2], places[:, :2] + (places[:, 2:] - places[:, :2]) * growth], dim=1)
    return replace(batch, images=continued(batch.images), conditions=continued(batch.conditions), crop_boxes=places)


def _batch_field(conditioner: Conditioner) -> str:
    return getattr(conditioner, "batch_field", "conditions")


def _batch_from_images(images: Tensor, wanted: Mapping[str, str]) -> Batch:
    found = set(wanted.values())
    if not found:
        raise UserError("conditions: this prior was not trained on maps or images; label= may choose a class")
    if len(found) > 1:
        names = " and ".join(f"'{name}' reads {field}" for name, field in wanted.items())
        raise UserError(f"conditions: of several conditioners each wants an image, {names}; give each its own")
    one: dict[str, Any] = {found.pop(): images.reshape(-1, *images.shape[-3:])}
    return replace(Batch(), **one)


def _check_condition_image(name: str, field: str, images: Tensor | None, conditioner: Conditioner) -> None:
    if images is None:
        what = "an image to look at" if field == "images" else "a map"
        raise UserError(f"conditioner '{name}' needs {what}, and the image is as large as that; condition= gives one")
    channels: int = conditioner.channels  # type: ignore[attr-defined]
    if images.shape[1] != channels:
        raise UserError(
            f"conditioner '{name}' was trained on images of {channels} channels, not of {images.shape[1]}; "
            "data.maps and data.labels say how a map is read"
        )
