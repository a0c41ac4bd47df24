"""Draw new pictures from a finished stage-2 run."""

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
from vqf.evaluation.class_accuracy import reads_labels
from vqf.images import as_colours
from vqf.models.condition_batch import fields, picture_fields
from vqf.models.generator import Generator
from vqf.pipelines.sampling.conditions import Condition, DrawnBy, files, held_out
from vqf.pipelines.sampling.image_folder import PictureFolder, digest, settings_of
from vqf.pipelines.sampling.open_run import open_run
from vqf.registry import build, register
from vqf.runs.provenance import Meter
from vqf.runs.run_logger import start_run
from vqf.terminal import log

SHOWN = 64  # pictures in the grid


@dataclass
class Shown:
    """The first pictures that one condition gave, for the grid."""

    pictures: list[Tensor] = field(default_factory=list)  # (3, H, W)
    told: list[Batch | None] = field(default_factory=list)  # of one row


@register("pipeline", "sample")
class Sample:
    """Draw new pictures from the prior of a run.

    `resume=true` goes on with a folder that was not finished: what is there is not drawn again. Every picture holds the
    settings that decided it, and a folder of others is refused.

    Args:
        count: How many; 64 by default, or one for each condition.
        label: One class for all, by number or name; by default classes take turns.
        size: Height and width in pixels as `size=[512,768]`, or one number for both; by default as in training. Larger
            pictures want `sampler=sliding_window`.
        candidates: Draw so many for each picture, and keep the one that `scorer=` likes best.
        tile: Decode no more than so many codes per side at once, in tiles that fade into each other; null decodes a
            picture whole.
        condition: A picture to draw by, or a folder of them: a map, or what else the prior was trained on. One for each
            conditioner where several are told by pictures: `condition={spatial:map.png,image:photo.png}`. Each gives
            `count` pictures of its own size. By default held-out conditions of the run's data take turns.
        place: Where in the whole picture a condition lies, for a prior that is told places: top, left, bottom and right
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
            raise UserError(f"count={count}: draw at least one picture")
        if condition is not None and size is not None:
            raise UserError("size and condition: a picture is as large as its condition; leave size out")
        if condition is None and place is not None:
            raise UserError("place: says where a condition lies; give condition=, too")
        self.config, self.run_dir, self.label, self.size = config, run_dir, label, size
        self.candidates, self.tile, self.place = candidates, tile, place
        self.count = count or (1 if condition else 64)
        self.condition: Condition | None = condition

    def run(self) -> None:
        """Write `samples/*.png` and a grid of them."""
        meter = Meter()
        drawing = open_run(self.config)
        config, generator = drawing.config, drawing.generator
        generator.scorer = build("scorer", config.scorer) if config.get("scorer") else None
        label = None if self.label is None else generator.class_index(self.label)
        named = None if label is None else generator.classes[label]
        options = {"label": named, "size": _plain(self.size), "candidates": self.candidates, "tile": self.tile}
        settings = settings_of(drawing.checkpoint, config, **options)
        conditions = self._conditions(generator, config)
        drawn = ((each, self._draw(generator, each, settings, config.batch_size)) for each in conditions)
        first = next(drawn)  # what is wrong with the options shows here, before there is a report
        with start_run(config, self.run_dir, meter) as journal:
            for told, shown in chain([first], drawn):
                kind = "conditions" if picture_fields(generator.conditioner) else "samples"
                journal.images(0, f"{kind}-{told.name}".strip("-"), beside(shown, generator))
                journal.details(self._said(generator, label, len(shown.pictures)))
        log.info("pictures in %s", self.run_dir / "samples")

    def _conditions(self, generator: Generator, config: DictConfig) -> Iterator[DrawnBy]:
        if self.condition is not None:
            return iter(files(self.condition, self.place, generator, config.data))
        if pictures := picture_fields(generator.conditioner):
            if self.size is not None:
                raise UserError(
                    f"size={self.size}: this prior draws by pictures ({', '.join(pictures)}), and what it draws is as "
                    "large as they are; give condition=FILE of that size"
                )
        elif self.size is not None and fields(generator.conditioner):
            return iter([DrawnBy("", lambda first, last: None)])  # of another size than in training: the whole picture
        return iter([held_out(generator, config, self.count)])

    def _draw(self, generator: Generator, by: DrawnBy, settings: Mapping[str, Any], size: int) -> Shown:
        """Draw and save pictures batch by batch, and return the first of them."""
        folder, shown = PictureFolder(self.run_dir / "samples", bool(self.config.resume)), Shown()
        with terminal.progress("sample", self.count) as bar:
            for i in range(0, self.count, size):
                now = min(size, self.count - i)
                told = by.told(i, i + now)
                rows = [j if told is not None and len(told) == now else 0 for j in range(now)]
                names = {
                    f"{by.name}{i + j:06d}": {**settings, "condition": digest(told, row)} for j, row in enumerate(rows)
                }
                if not folder.has(names):
                    self._save(generator, folder, names, told, i)
                if i < SHOWN:
                    shown.pictures += [folder.read(name) for name in names]
                    shown.told += [told and told.part(row, row + 1) for row in rows]
                bar.advance(now)
        return Shown(shown.pictures[:SHOWN], shown.told[:SHOWN])

    def _save(
        self,
        generator: Generator,
        folder: PictureFolder,
        names: Mapping[str, Mapping[str, Any]],
        told: Batch | None,
        first: int,
    ) -> None:
        some: Mapping[str, Any] = next(iter(names.values()))
        pictures = generator.sample(
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
        for (name, settings), picture in zip(names.items(), pictures, strict=True):
            folder.save(name, picture, settings)

    def _said(self, generator: Generator, label: int | None, count: int) -> dict[str, Any]:
        """Return the classes of what is shown, for those who look at it."""
        names, told = generator.classes, Batch(labels=torch.zeros(1, dtype=torch.int64, device=generator.device))
        if generator.conditioner.channels is not None or not reads_labels(generator, told):
            return {}
        return {"samples": {"labels": [names[i % len(names) if label is None else label] for i in range(count)]}}


def beside(shown: Shown, generator: Generator) -> Tensor:
    """Return each picture after the pictures that it was drawn by, if there are any."""
    pictures = torch.stack(shown.pictures)
    rows = []
    for name in dict.fromkeys(picture_fields(generator.conditioner).values()):
        rows.append(as_colours(torch.cat([getattr(told, name) for told in shown.told])).to(pictures))
    return rearrange([*rows, pictures], "rows b c h w -> (b rows) c h w")


def _plain(size: int | Sequence[int] | None) -> int | list[int] | None:
    return size if size is None or isinstance(size, int) else list(size)
