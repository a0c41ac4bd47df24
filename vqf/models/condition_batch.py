"""The conditions of a sampling call as one checked `Batch`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.batch import Batch, Size
from vqf.errors import UserError
from vqf.models.conditioning import ConditionerStack
from vqf.models.inputs import check_images
from vqf.protocols import ReadsImages


def image_fields(conditioner: ConditionerStack) -> dict[str, str]:
    """The batch field of every conditioner that reads an image."""
    return {name: each.batch_field for name, each in conditioner.image_conditioners()}


def condition_batch(conditions: Tensor | Batch | None, conditioner: ConditionerStack, count: int) -> Batch:
    """Collect the fields that the conditioners read into a batch of `count` rows.

    Args:
        conditions: Images (count, C, H, W), or (C, H, W) for all, of the only image conditioner; or a batch of `count`
            rows, or of one for all.

    Raises:
        UserError: If an image is missing, or channels or rows are wrong.
    """
    fields = image_fields(conditioner)
    if conditions is None or isinstance(conditions, Batch):
        batch = conditions or Batch()
    else:
        batch = _batch_from_images(conditions, fields, conditioner)
    for name, reader in conditioner.image_conditioners():
        if name not in batch.condition_indices:
            _check_condition_image(name, getattr(batch, reader.batch_field), reader)
    used = {field: getattr(batch, field) for field in {*fields.values(), "labels", "crop_boxes"}}
    batch = Batch(**used, condition_indices=batch.condition_indices)
    wrong = {len(tensor) for tensor in batch.tensors().values()} - {1, count}
    if wrong:
        raise UserError(f"conditions: {max(wrong)} of them for {count} images")
    return batch.map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))


def condition_image_size(batch: Batch) -> Size | None:
    """Height and width of the condition images, if any.

    Raises:
        UserError: If their sizes differ.
    """
    sizes = {(each.shape[-2], each.shape[-1]) for each in (batch.images, batch.conditions) if each is not None}
    if len(sizes) > 1:
        both = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise UserError(f"conditions: images of {both} pixels cannot show the same scene; resize them to one size")
    return next(iter(sizes), None)


def pad_to(batch: Batch, size: Size, target: Size) -> Batch:
    """Pad images and crop boxes of a batch to `target`, by replicating edges."""
    if size == target:
        return batch
    below, right = target[0] - size[0], target[1] - size[1]

    def pad(images: Tensor | None) -> Tensor | None:
        return None if images is None else F.pad(images, (0, right, 0, below), mode="replicate")

    boxes = batch.crop_boxes
    if boxes is not None:
        growth = torch.tensor([target[0] / size[0], target[1] / size[1]], device=boxes.device)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) * growth], dim=1)
    return replace(batch, images=pad(batch.images), conditions=pad(batch.conditions), crop_boxes=boxes)


def _batch_from_images(images: Tensor, fields: Mapping[str, str], conditioner: ConditionerStack) -> Batch:
    distinct = set(fields.values())
    if not distinct:
        raise UserError(
            "conditions: this prior was not trained on condition maps or images; label=CLASS chooses a class"
        )
    if len(distinct) > 1:
        readers = " and ".join(f"'{name}' reads {field}" for name, field in fields.items())
        raise UserError(
            f"conditions: several conditioners read images, {readers}; pass a Batch with each of these fields"
        )
    if isinstance(images, Tensor) and images.ndim == 3 and len(images) == conditioner.channels:
        images = images[None]
    only: dict[str, Any] = {distinct.pop(): images}
    return Batch(**only)


def _check_condition_image(name: str, images: Tensor | None, reader: ReadsImages) -> None:
    if images is None:
        kind = "an image" if reader.batch_field == "images" else "a condition map"
        raise UserError(f"conditioner '{name}' needs {kind} of the size of the sample; pass one with condition=FILE")
    if isinstance(images, Tensor) and images.ndim == 4 and reader.channels not in images.shape:
        raise UserError(
            f"conditioner '{name}' was trained on images of {reader.channels} channels, not of {images.shape[1]}; "
            "data.maps and data.labels set how a condition map is read"
        )
    check_images(images, reader.channels, "conditions")
