"""Draw new pictures from a finished stage-2 run."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.errors import UserError
from vqf.generator import Generator
from vqf.pipelines.classes import reads_labels
from vqf.pipelines.common import start_run
from vqf.pipelines.engine import make_engine
from vqf.pipelines.inherit import inherit
from vqf.pipelines.pictures import as_colours, read_picture, save_pictures
from vqf.pipelines.restore import find_generator, load_generator
from vqf.protocols import Batch
from vqf.registry import build, register
from vqf.terminal import log

SHOWN = 64  # pictures in the grid


@register("pipeline", "sample")
class Sample:
    """Draw new pictures from the prior of a run.

    `resume=true` goes on with a folder that was not finished: what is there is not drawn again.

    Args:
        count: How many; 64 by default, or one for each condition.
        label: One class for all, by number or name; by default classes take turns.
        size: Height and width in pixels as `size=[512,768]`, or one number for both; by default as in training. Larger
            pictures want `sampler=sliding_window`.
        candidates: Draw so many for each picture, and keep the one that `scorer=` likes best.
        tile: Decode no more than so many codes per side at once, in tiles that fade into each other; null decodes a
            picture whole.
        condition: A picture to draw by, or a folder of them: a map, or what else the prior was trained on. Each gives
            `count` pictures of its own size. By default held-out conditions of the run's data take turns.
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
        condition: str | None = None,
    ) -> None:
        if candidates < 1 or (tile is not None and tile < 8):
            raise UserError(f"candidates={candidates} must be at least 1, tile={tile} at least 8 codes")
        if count is not None and count < 1:
            raise UserError(f"count={count}: draw at least one picture")
        if condition is not None and size is not None:
            raise UserError("size and condition: a picture is as large as its condition; leave size out")
        self.config, self.run_dir, self.label, self.size = config, run_dir, label, size
        self.candidates, self.tile = candidates, tile
        self.count = count or (1 if condition else 64)
        self.condition = None if condition is None else Path(condition).expanduser()

    def run(self) -> None:
        """Write `samples/*.png` and a grid of them."""
        checkpoint = find_generator(self.config.run)
        config = inherit(self.config, checkpoint.config, ["data", "sampler", "batch_size"])
        engine = make_engine(config)
        generator = load_generator(checkpoint, config.sampler).to(engine.device)
        generator.scorer = build("scorer", config.scorer) if config.get("scorer") else None
        label = None if self.label is None else generator.class_index(self.label)
        with start_run(config, self.run_dir) as journal:
            for name, conditions in self._conditions(generator, config):
                shown = self._draw(generator, name, label, conditions, config)
                kind = "samples" if conditions is None else "conditions"
                journal.images(0, f"{kind}-{name}".strip("-"), beside(shown, conditions))
                journal.details(self._said(generator, label, len(shown)))
        log.info("pictures in %s", self.run_dir / "samples")

    def _draw(
        self, generator: Generator, name: str, label: int | None, conditions: Tensor | None, config: DictConfig
    ) -> Tensor:
        """Draw and save pictures batch by batch, and return the first of them."""
        folder, size, shown = self.run_dir / "samples", config.batch_size, []
        with terminal.progress("sample", self.count) as bar:
            for i in range(0, self.count, size):
                now = min(size, self.count - i)
                paths = [folder / f"{name}{j:06d}.png" for j in range(i, i + now)]
                if not (config.resume and all(path.is_file() for path in paths)):
                    told = conditions if conditions is None or conditions.ndim == 3 else conditions[i : i + now]
                    pictures = generator.sample(
                        now,
                        label=label,
                        seed=config.seed,
                        first=i,
                        batch_size=now,
                        size=self.size,
                        conditions=told,
                        tile=self.tile,
                        candidates=self.candidates,
                    )
                    save_pictures(pictures, folder, (path.stem for path in paths))
                if i < SHOWN:
                    shown += [read_picture(path, 3) for path in paths]
                bar.advance(now)
        return torch.stack(shown[:SHOWN])

    def _said(self, generator: Generator, label: int | None, count: int) -> dict[str, Any]:
        """Return the classes of what is shown, for those who look at it."""
        names, told = generator.classes, Batch(labels=torch.zeros(1, dtype=torch.int64, device=generator.device))
        if generator.conditioner.channels is not None or not reads_labels(generator, told):
            return {}
        return {"samples": {"labels": [names[i % len(names) if label is None else label] for i in range(count)]}}

    def _conditions(self, generator: Generator, config: DictConfig) -> Iterator[tuple[str, Tensor | None]]:
        """Yield what to draw by, (C, H, W) or (count, C, H, W), and what its files are called."""
        channels = generator.conditioner.channels
        if channels is None and self.condition is not None:
            raise UserError("condition: this prior was not trained on maps or pictures; label= may choose a class")
        if self.condition is not None and channels is not None:
            multiple = math.lcm(generator.tokenizer.stride, generator.conditioner.multiple)
            for path in _files(self.condition):
                yield f"{path.stem}-", read_picture(path, channels, multiple)
        else:
            yield "", None if channels is None else self._held_out(generator, config)

    def _held_out(self, generator: Generator, config: DictConfig) -> Tensor:
        data = build("data", config.data, image_size=generator.tokenizer.image_size, seed=config.seed)
        split, wanted = data.split("validation"), "image" if "image" in generator.conditioner.parts else "condition"
        samples = [split.item(0, i * len(split) // self.count) for i in range(self.count)]
        return torch.stack([getattr(sample, wanted) for sample in samples])


def beside(pictures: Tensor, conditions: Tensor | None) -> Tensor:
    """Return each picture after its condition, if it has one."""
    if conditions is None:
        return pictures
    conditions = conditions if conditions.ndim == 3 else conditions[: len(pictures)]
    shown = as_colours(conditions.expand(len(pictures), *conditions.shape[-3:])).to(pictures)
    return rearrange([shown, pictures], "two b c h w -> (b two) c h w")


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"condition={path}: no such file or folder")
    found = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
    if not found:
        raise UserError(f"condition={path}: the folder is empty")
    return found
