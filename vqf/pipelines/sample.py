"""Draw new images from a finished stage-2 run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.batch import Batch
from vqf.errors import UserError
from vqf.evaluation.class_accuracy import is_class_conditional
from vqf.images import to_rgb
from vqf.models.condition_batch import image_fields, per_image_fields
from vqf.models.generator import Generator
from vqf.pipelines.sampling.conditions import ConditionOption, ConditionSource, from_files, from_validation
from vqf.pipelines.sampling.image_folder import ResumableImageFolder, condition_digest, sampling_settings
from vqf.pipelines.sampling.open_run import open_run
from vqf.registry import build, register
from vqf.runs.provenance import ResourceMeter
from vqf.runs.run_logger import start_run
from vqf.terminal import log

MAX_PREVIEW_IMAGES = 64  # images in the grid


@dataclass
class PreviewGrid:
    """The first images that one condition gave, for the grid."""

    images: list[Tensor] = field(default_factory=list)  # (3, H, W)
    conditions: list[Batch | None] = field(default_factory=list)  # of one row


@register("pipeline", "sample")
class SamplePipeline:
    """Draw new images from the prior of a run.

    `resume=true` goes on with a folder that was not finished: what is there is not drawn again. Every image holds the
    settings that decided it, and a folder of others is refused.

    Args:
        count: How many; 64 by default, or one for each condition.
        label: One class for all, by number or name; by default classes take turns.
        size: Height and width in pixels as `size=[512,768]`, or one number for both; by default as in training. Larger
            images want `sampler=sliding_window`.
        candidates: Draw so many for each image, and keep the one that `scorer=` likes best.
        tile: Decode no more than so many codes per side at once, in tiles that fade into each other; null decodes an
            image whole.
        condition: An image to draw by, or a folder of them: a map, or what else the prior was trained on. One for each
            conditioner where several are told by images: `condition={spatial:map.png,image:photo.png}`. Each gives
            `count` images of its own size. By default held-out conditions of the run's data take turns.
        place: Where in the whole image a condition lies, for a prior that is told places: top, left, bottom and right
            as shares of it; by default a condition is the whole.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        count: int | None = None,
        label: str | None = None,
        size: int | Sequence[int] | None = None,
        candidates: int = 1,
        tile: int | None = 128,
        condition: str | Mapping[str, str] | None = None,
        place: Sequence[float] | None = None,
    ) -> None:
        if candidates < 1 or (tile is not None and tile < 8):
            raise UserError(f"candidates={candidates} must be at least 1, tile={tile} at least 8 codes")
        if count is not None and count < 1:
            raise UserError(f"count={count}: draw at least one image")
        if condition is not None and size is not None:
            raise UserError("size and condition: an image is as large as its condition; leave size out")
        if condition is None and place is not None:
            raise UserError("place: says where a condition lies; give condition=, too")
        self.config, self.run_dir, self.label, self.size = config, run_dir, label, size
        self.candidates, self.tile, self.place = candidates, tile, place
        self.count = count or (1 if condition else 64)
        self.condition: ConditionOption | None = condition

    def run(self) -> None:
        """Write `samples/*.png` and a grid of them."""
        meter = ResourceMeter()
        drawing = open_run(self.config)
        config, generator = drawing.config, drawing.generator
        generator.scorer = build("scorer", config.scorer) if config.get("scorer") else None
        label = None if self.label is None else generator.class_index(self.label)
        named = None if label is None else generator.classes[label]
        options = {"label": named, "size": _to_plain(self.size), "candidates": self.candidates, "tile": self.tile}
        settings = sampling_settings(drawing.checkpoint, config, **options)
        conditions = self._conditions(generator, config)
        drawn = ((each, self._generate(generator, each, settings, config.batch_size)) for each in conditions)
        first = next(drawn)  # what is wrong with the options shows here, before there is a report
        with start_run(config, self.run_dir, meter) as journal:
            for told, shown in chain([first], drawn):
                kind = "conditions" if image_fields(generator.conditioner) else "samples"
                journal.images(0, f"{kind}-{told.name}".strip("-"), with_conditions(shown, generator))
                journal.write_details(self._label_metadata(generator, label, len(shown.images)))
        log.info("images in %s", self.run_dir / "samples")

    def _conditions(self, generator: Generator, config: DictConfig) -> Iterator[ConditionSource]:
        if self.condition is not None:
            return iter(from_files(self.condition, self.place, generator, config.data))
        if images := image_fields(generator.conditioner):
            if self.size is not None:
                raise UserError(
                    f"size={self.size}: this prior draws by images ({', '.join(images)}), and what it draws is as "
                    "large as they are; give condition=FILE of that size"
                )
        elif self.size is not None and per_image_fields(generator.conditioner):
            return iter(
                [ConditionSource("", lambda first, last: None)]
            )  # of another size than in training: the whole image
        return iter([from_validation(generator, config, self.count)])

    def _generate(
        self, generator: Generator, by: ConditionSource, settings: Mapping[str, Any], size: int
    ) -> PreviewGrid:
        """Draw and save images batch by batch, and return the first of them."""
        folder, shown = ResumableImageFolder(self.run_dir / "samples", bool(self.config.resume)), PreviewGrid()
        with terminal.progress("sample", self.count) as bar:
            for i in range(0, self.count, size):
                now = min(size, self.count - i)
                told = by.batch_for(i, i + now)
                rows = [j if told is not None and len(told) == now else 0 for j in range(now)]
                names = {
                    f"{by.name}{i + j:06d}": {**settings, "condition": condition_digest(told, row)}
                    for j, row in enumerate(rows)
                }
                if not folder.has(names):
                    self._save(generator, folder, names, told, i)
                if i < MAX_PREVIEW_IMAGES:
                    shown.images += [folder.read(name) for name in names]
                    shown.conditions += [told and told.slice(row, row + 1) for row in rows]
                bar.advance(now)
        return PreviewGrid(shown.images[:MAX_PREVIEW_IMAGES], shown.conditions[:MAX_PREVIEW_IMAGES])

    def _save(
        self,
        generator: Generator,
        folder: ResumableImageFolder,
        names: Mapping[str, Mapping[str, Any]],
        told: Batch | None,
        first: int,
    ) -> None:
        some: Mapping[str, Any] = next(iter(names.values()))
        images = generator.sample(
            len(names),
            label=some["label"],
            seed=some["seed"],
            first=first,
            batch_size=len(names),
            size=self.size,
            conditions=told,
            tile=self.tile,
            candidates=self.candidates,
        )
        for (name, settings), image in zip(names.items(), images, strict=True):
            folder.save(name, image, settings)

    def _label_metadata(self, generator: Generator, label: int | None, count: int) -> dict[str, Any]:
        """Return the classes of what is shown, for those who look at it."""
        names, told = generator.classes, Batch(labels=torch.zeros(1, dtype=torch.int64, device=generator.device))
        if generator.conditioner.channels is not None or not is_class_conditional(generator, told):
            return {}
        return {"samples": {"labels": [names[i % len(names) if label is None else label] for i in range(count)]}}


def with_conditions(shown: PreviewGrid, generator: Generator) -> Tensor:
    """Return each image after the images that it was drawn by, if there are any."""
    images = torch.stack(shown.images)
    rows = []
    for name in dict.fromkeys(image_fields(generator.conditioner).values()):
        rows.append(to_rgb(torch.cat([getattr(told, name) for told in shown.conditions])).to(images))
    return rearrange([*rows, images], "rows b c h w -> (b rows) c h w")


def _to_plain(size: int | Sequence[int] | None) -> int | list[int] | None:
    return size if size is None or isinstance(size, int) else list(size)
