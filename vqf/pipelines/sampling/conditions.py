"""What samples are drawn by: images of the user's, or held-out ones of the run's data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from vqf.batch import Batch
from vqf.errors import UserError
from vqf.images import condition_map_reader, image_files, read_image
from vqf.models.condition_batch import image_fields, per_image_fields
from vqf.models.generator import Generator
from vqf.registry import build

ConditionOption = str | Mapping[str, str]


@dataclass(frozen=True)
class ConditionSource:
    """A condition for some images."""

    name: str  # what the names of their files begin with
    batch_for: Callable[[int, int], Batch | None]  # image `first` to `last` - 1: a row for each, or one for all


def from_files(
    condition: ConditionOption, place: Sequence[float] | None, generator: Generator, data: DictConfig
) -> list[ConditionSource]:
    """Return what images of the user's tell, each read as the run's data reads its own.

    Args:
        condition: A file or a folder; one for each conditioner, by its name, where several are told by images.
        place: Where in the whole image all of them lie: top, left, bottom, right.
        generator: Draws by them.
        data: The node of the data that it was trained on.

    Raises:
        UserError: If a file cannot be read, or one is missing.
    """
    wanted = image_fields(generator.conditioner)
    readers = {name: read_image if field == "images" else condition_map_reader(data) for name, field in wanted.items()}
    where: dict[str, Any] = {} if place is None else {"crop_boxes": _crop_box(place, generator)}

    def told(row: Mapping[str, Path]) -> Batch:
        given: dict[str, Any] = {wanted[name]: readers[name](path)[None] for name, path in row.items()}
        return replace(Batch(), **given, **where)

    rows = dict(_paths_by_sample(_paths_by_conditioner(condition, wanted)))
    for row in rows.values():
        told(row)  # the last of many must not turn out to be broken after hours
    return [ConditionSource(f"{name}-", lambda first, last, row=row: told(row)) for name, row in rows.items()]  # type: ignore[misc]


def from_validation(generator: Generator, config: DictConfig, count: int) -> ConditionSource:
    """Return what held-out samples tell, spread evenly; nothing if the prior is told no more than a class."""
    asked = per_image_fields(generator.conditioner)
    if not asked:
        return ConditionSource("", lambda first, last: None)
    data = build("data", config.data, image_size=generator.tokenizer.image_size, seed=config.seed)
    split = data.split("validation")

    def told(first: int, last: int) -> Batch:
        batch = Batch.collate([split.item(0, i * len(split) // count) for i in range(first, last)])
        # Where no image is told, places alone are: classes take turns as ever.
        return batch if image_fields(generator.conditioner) else Batch(crop_boxes=batch.crop_boxes)

    return ConditionSource("", told)


def _paths_by_conditioner(condition: ConditionOption, wanted: Mapping[str, str]) -> dict[str, list[Path]]:
    if not wanted:
        raise UserError("condition: this prior was not trained on maps or images; label= may choose a class")
    example = f"condition={{{','.join(f'{name}:{name}.png' for name in wanted)}}}"
    if isinstance(condition, str):
        if len(wanted) > 1:
            raise UserError(f"condition={condition}: this prior is told by several images; give each, as {example}")
        condition = {next(iter(wanted)): condition}
    if missing := [name for name in wanted if name not in condition]:
        raise UserError(f"condition: the image for conditioner '{missing[0]}' is missing; give {example}")
    if unknown := [name for name in condition if name not in wanted]:
        raise UserError(
            f"condition.{unknown[0]}: no conditioner of this prior that is told by an image; give {example}"
        )
    return {name: image_files(Path(path).expanduser()) for name, path in condition.items()}


def _paths_by_sample(paths: Mapping[str, list[Path]]) -> Iterator[tuple[str, dict[str, Path]]]:
    """Yield the images that belong together, and what they are called: without their endings if these differ."""
    first = next(iter(paths.values()))
    if all(len(each) == 1 for each in paths.values()):
        yield first[0].stem, {name: each[0] for name, each in paths.items()}
        return
    stems = {name: [path.stem for path in each] for name, each in paths.items()}
    if len(paths) > 1 and len({tuple(each) for each in stems.values()}) > 1:
        raise UserError(f"condition: the folders of {' and '.join(paths)} hold images of different names")
    known = stems[next(iter(paths))]
    for i, path in enumerate(first):
        yield path.stem if known.count(path.stem) == 1 else path.name, {name: each[i] for name, each in paths.items()}


def _crop_box(place: Sequence[float], generator: Generator) -> Tensor:
    if "crop_boxes" not in per_image_fields(generator.conditioner):
        raise UserError("place: this prior is not told places; model/conditioner=[...,coordinates] trains one that is")
    if len(place) != 4 or place[0] >= place[2]:
        raise UserError(f"place={list(place)}: give top, left, bottom and right as shares of the whole, [0.2,0,0.5,1]")
    return torch.tensor([list(map(float, place))])
