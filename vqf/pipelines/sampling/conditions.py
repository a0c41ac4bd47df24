"""Conditions from the user's images or validation samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from vqf.batch import Batch
from vqf.errors import UserError
from vqf.images import condition_map_reader, image_files, read_image
from vqf.models.condition_batch import image_fields
from vqf.models.generator import Generator
from vqf.registry import build

ConditionOption = str | Mapping[str, str]


@dataclass(frozen=True)
class ConditionSource:
    """Conditions for a series of images."""

    name: str  # prefix of the image files
    batch_for: Callable[[int, int], Batch | None]  # condition of images `first` to `last` - 1: one row each, or one row


def unconditional() -> ConditionSource:
    """Return a source without conditions; classes take turns."""
    return ConditionSource("", lambda first, last: None)


def from_files(
    condition: ConditionOption, place: Sequence[float] | None, generator: Generator, data: DictConfig
) -> list[ConditionSource]:
    """Read conditions from files, as the run's data source reads its own.

    Args:
        place: Crop box: top, left, bottom, right as fractions of the full image.

    Raises:
        UserError: If a file is missing or cannot be read.
    """
    fields = image_fields(generator.conditioner)
    read_photo = partial(read_image, value_range=data.get("range"))
    readers = {name: read_photo if field == "images" else condition_map_reader(data) for name, field in fields.items()}
    crop_boxes: dict[str, Any] = {} if place is None else {"crop_boxes": _crop_box(place, generator)}

    def read_batch(paths: Mapping[str, Path], first: int = 0, last: int = 1) -> Batch:
        images: dict[str, Any] = {fields[name]: readers[name](path)[None] for name, path in paths.items()}
        return replace(Batch(), **images, **crop_boxes)

    samples = dict(_paths_by_sample(_paths_by_conditioner(condition, fields)))
    for paths in samples.values():
        read_batch(paths)  # the last of many files must not turn out to be broken after hours of sampling
    return [ConditionSource(f"{name}-", partial(read_batch, paths)) for name, paths in samples.items()]


def from_validation(generator: Generator, config: DictConfig, count: int) -> ConditionSource:
    """Take `count` validation conditions, spread evenly; none if the prior reads at most a class."""
    if not generator.conditioner.fields:
        return unconditional()
    data = build("data", config.data, image_size=generator.tokenizer.image_size, seed=config.seed)
    split = data.split("validation")

    def validation_batch(first: int, last: int) -> Batch:
        batch = Batch.collate([split.item(0, i * len(split) // count) for i in range(first, last)])
        # A prior without image conditions gets the crop boxes only, so that its classes take turns.
        return batch if image_fields(generator.conditioner) else Batch(crop_boxes=batch.crop_boxes)

    return ConditionSource("", validation_batch)


def _paths_by_conditioner(condition: ConditionOption, fields: Mapping[str, str]) -> dict[str, list[Path]]:
    if not fields:
        raise UserError("condition: this prior was not trained on maps or images; label= may choose a class")
    example = f"'condition={{{','.join(f'{name}:{name}.png' for name in fields)}}}'"
    if isinstance(condition, str):
        if len(fields) > 1:
            raise UserError(f"condition={condition}: this prior has {len(fields)} image conditioners; give {example}")
        condition = {next(iter(fields)): condition}
    if missing := [name for name in fields if name not in condition]:
        raise UserError(f"condition: the image for conditioner '{missing[0]}' is missing; give {example}")
    if unknown := [name for name in condition if name not in fields]:
        raise UserError(f"condition.{unknown[0]}: this prior has no image conditioner of that name; give {example}")
    return {name: image_files(Path(path).expanduser()) for name, path in condition.items()}


def _paths_by_sample(paths: Mapping[str, list[Path]]) -> Iterator[tuple[str, dict[str, Path]]]:
    """Yield name and paths of each sample; files of several folders are paired by stem."""
    first = next(iter(paths.values()))
    if all(len(files) == 1 for files in paths.values()):
        yield first[0].stem, {name: files[0] for name, files in paths.items()}
        return
    stems = {name: [path.stem for path in files] for name, files in paths.items()}
    if len(paths) > 1 and len({tuple(each) for each in stems.values()}) > 1:
        raise UserError(f"condition: the folders of {' and '.join(paths)} hold images of different names")
    first_stems = stems[next(iter(paths))]
    for i, path in enumerate(first):
        # a.png and a.jpg of one folder need their endings, or one sample would overwrite the other
        name = path.stem if first_stems.count(path.stem) == 1 else path.name
        yield name, {conditioner: files[i] for conditioner, files in paths.items()}


def _crop_box(place: Sequence[float], generator: Generator) -> Tensor:
    if "crop_boxes" not in generator.conditioner.fields:
        raise UserError(
            "place: this prior is not conditioned on crop boxes; train one with model/conditioner=[...,coordinates]"
        )
    if len(place) != 4 or place[0] >= place[2]:
        raise UserError(
            f"place={list(place)}: give top, left, bottom and right as fractions of the image, as in [0.2,0,0.5,1]"
        )
    return torch.tensor([list(map(float, place))])
