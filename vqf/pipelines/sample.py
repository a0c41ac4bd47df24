"""Sample new images from a finished stage-2 run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.batch import Batch
from vqf.distributed.threads import cpu_threads
from vqf.errors import UserError
from vqf.evaluation.class_accuracy import is_class_conditional
from vqf.models.condition_batch import image_fields
from vqf.models.generator import Generator
from vqf.options.ranges import Number, PositiveInt, Sides
from vqf.pipelines.sampling.conditions import (
    ConditionOption,
    ConditionSource,
    from_files,
    from_validation,
    unconditional,
)
from vqf.pipelines.sampling.image_folder import ResumableImageFolder, condition_digest
from vqf.pipelines.sampling.open_run import open_run
from vqf.registry import build, register
from vqf.runs.provenance import ResourceMeter
from vqf.runs.run_logger import start_run
from vqf.terminal import log

MAX_PREVIEW_IMAGES = 64  # images in the grid


@dataclass
class PreviewGrid:
    """The first images and conditions, for the grid."""

    images: list[Tensor] = field(default_factory=list)  # (3, H, W)
    conditions: list[Batch | None] = field(default_factory=list)  # one row per image


@register("pipeline", "sample")
class SamplePipeline:
    """Sample new images from the prior of a run.

    `resume=true` keeps the images of an interrupted run; a folder with other settings is refused.

    Args:
        count: Number of images; by default 64, or one per condition.
        label: Class of all images, by name or number; by default classes take turns.
        size: Height and width in pixels as `size=[512,768]`, or one number for both; by default as in training.
            Larger images need `sampler=sliding_window`.
        candidates: Samples per image; `scorer=` keeps the best.
        tile: Largest side, in codes, that is decoded at once: larger images are decoded in overlapping
            tiles that are blended. null decodes every image in one piece.
        condition: Image to condition on, or a folder of them: a condition map, or whatever image the prior was trained
            on. With several image conditioners, one for each: `'condition={spatial:map.png,image:photo.png}'`. Each
            gives `count` images of its own size. By default conditions of validation samples take turns.
        place: Crop box of the condition, for a prior that is conditioned on crop boxes: top, left, bottom and right as
            fractions of the full image; by default the full image.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        count: PositiveInt | None = None,
        label: str | None = None,
        size: Sides | None = None,
        candidates: PositiveInt = 1,
        tile: Annotated[int, Ge(8)] | None = 128,
        condition: str | Mapping[str, str] | None = None,
        place: tuple[Number, Number, Number, Number] | None = None,
    ) -> None:
        if condition is not None and size is not None:
            raise UserError("size and condition: an image is as large as its condition; leave size out")
        if condition is None and place is not None:
            raise UserError("place: it is the crop box of a condition; give condition=FILE, too")
        self.config, self.run_dir, self.label, self.size = config, run_dir, label, size
        self.candidates, self.tile, self.place = candidates, tile, place
        self.count = count or (1 if condition else 64)
        self.condition: ConditionOption | None = condition

    def run(self) -> None:
        meter = ResourceMeter()
        opened = open_run(self.config)
        config, generator = opened.config, opened.generator
        generator.scorer = build("scorer", config.scorer) if config.get("scorer") else None
        label = opened.class_name(self.label)
        settings = opened.settings(label=label, size=_to_plain(self.size), candidates=self.candidates, tile=self.tile)
        sources = self._condition_sources(generator, config)
        previews = ((source, self._sample_all(generator, source, settings, config.batch_size)) for source in sources)
        first = next(previews)  # options that cannot work fail here, before a run folder is started
        with start_run(config, self.run_dir, meter) as journal:
            for source, preview in chain([first], previews):
                kind = "conditions" if image_fields(generator.conditioner) else "samples"
                journal.images(0, f"{kind}-{source.name}".strip("-"), with_conditions(preview, generator))
                journal.write_details(self._label_metadata(generator, label, len(preview.images)))
        log.info("images in %s", self.run_dir / "samples")

    def _condition_sources(self, generator: Generator, config: DictConfig) -> Iterator[ConditionSource]:
        if self.condition is not None:
            return iter(from_files(self.condition, self.place, generator, config.data))
        if images := image_fields(generator.conditioner):
            if self.size is not None:
                raise UserError(
                    f"size={self.size}: this prior is conditioned on images ({', '.join(images)}), and a sample is as "
                    "large as they are; give condition=FILE of that size"
                )
        elif self.size is not None and generator.conditioner.fields:
            # Crop boxes of validation samples are those of the training size; at another size show the full image.
            return iter([unconditional()])
        return iter([from_validation(generator, config, self.count)])

    def _sample_all(
        self, generator: Generator, source: ConditionSource, settings: Mapping[str, Any], batch_size: int
    ) -> PreviewGrid:
        folder, preview = ResumableImageFolder(self.run_dir / "samples", bool(self.config.resume)), PreviewGrid()
        with terminal.progress("sample", self.count) as bar:
            for first in range(0, self.count, batch_size):
                count = min(batch_size, self.count - first)
                condition = source.batch_for(first, first + count)
                one_each = condition is not None and len(condition) == count  # else one row is shared by all images
                rows = [i if one_each else 0 for i in range(count)]
                images = {
                    f"{source.name}{first + i:06d}": {**settings, "condition": condition_digest(condition, row)}
                    for i, row in enumerate(rows)
                }
                folder.fill(images, partial(self._sample_batch, generator, settings, condition, first, count))
                if first < MAX_PREVIEW_IMAGES:
                    preview.images += [folder.read(name) for name in images]
                    preview.conditions += [condition and condition.slice(row, row + 1) for row in rows]
                bar.advance(count)
        return PreviewGrid(preview.images[:MAX_PREVIEW_IMAGES], preview.conditions[:MAX_PREVIEW_IMAGES])

    @cpu_threads.watch("sample")
    def _sample_batch(
        self, generator: Generator, settings: Mapping[str, Any], condition: Batch | None, first: int, count: int
    ) -> Tensor:
        return generator.sample(
            count,
            label=settings["label"],
            seed=settings["seed"],
            first=first,
            batch_size=count,
            size=self.size,
            conditions=condition,
            tile=self.tile,
            candidates=self.candidates,
        )

    def _label_metadata(self, generator: Generator, label: str | None, count: int) -> dict[str, Any]:
        names, probe = generator.classes, Batch(labels=torch.zeros(1, dtype=torch.int64, device=generator.device))
        if generator.conditioner.channels is not None or not is_class_conditional(generator, probe):
            return {}
        return {"samples": {"labels": [names[i % len(names)] if label is None else label for i in range(count)]}}


def with_conditions(preview: PreviewGrid, generator: Generator) -> Tensor:
    """Return the images (B, 3, H, W), each after its condition images."""
    images = torch.stack(preview.images)
    columns = []
    for reader in {each.batch_field: each for _, each in generator.conditioner.image_conditioners()}.values():
        conditions = torch.cat([getattr(condition, reader.batch_field) for condition in preview.conditions])
        columns.append(reader.show(conditions).to(images))
    return rearrange([*columns, images], "columns b c h w -> (b columns) c h w")


def _to_plain(size: int | Sequence[int] | None) -> int | list[int] | None:
    return size if size is None or isinstance(size, int) else list(size)
