"""Keep the upper part of held-out pictures and draw the rest: completion, section 4.2 of the paper of VQGAN."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.errors import UserError
from vqf.generator import Generator
from vqf.pipelines.common import start_run
from vqf.pipelines.engine import make_engine
from vqf.pipelines.inherit import inherit
from vqf.pipelines.loader import sequential
from vqf.pipelines.pictures import as_colours, save_pictures
from vqf.pipelines.restore import find_generator, load_generator
from vqf.protocols import Batch
from vqf.registry import build, register
from vqf.terminal import log

SHOWN = 16  # rows of the grid


@register("pipeline", "complete")
class Complete:
    """Complete held-out pictures of a stage-2 run's data from their upper part.

    Args:
        keep: Share of the rows of codes that is kept, from the top.
        count: How many pictures, spread evenly over the split.
    """

    def __init__(self, config: DictConfig, run_dir: Path, *, keep: float = 0.5, count: int = 16) -> None:
        if not 0 < keep < 1:
            raise UserError(f"keep={keep}: must be between 0 and 1; pipeline=sample draws whole pictures")
        if count < 1:
            raise UserError(f"count={count}: complete at least one picture")
        self.config, self.run_dir, self.keep, self.count = config, run_dir, keep, count
        self.labels: list[int] = []  # of the pictures

    def run(self) -> None:
        """Write `completions/*.png` and a grid of originals, what was kept of them, and completions."""
        checkpoint = find_generator(self.config.run)
        config = inherit(self.config, checkpoint.config, ["data", "sampler", "batch_size"])
        engine = make_engine(config)
        generator = load_generator(checkpoint, config.sampler).to(engine.device)
        data = build("data", config.data, image_size=generator.tokenizer.image_size, seed=config.seed)
        batches = sequential(data.split("validation"), config.batch_size, count=self.count, workers=config.workers)
        rows = torch.cat(list(self._rows(generator, batches, config.seed)))
        names = (f"{i:06d}" for i in range(len(rows)))
        save_pictures(rows[:, 2], self.run_dir / "completions", names)
        with start_run(config, self.run_dir) as journal:
            journal.images(checkpoint.step, "completions", rearrange(rows[:SHOWN], "b three c h w -> (b three) c h w"))
            journal.details({"completions": {"captions": [data.classes[label] for label in self.labels[:SHOWN]]}})
        log.info("%d pictures in %s", len(rows), self.run_dir / "completions")

    def _rows(self, generator: Generator, batches: Iterator[Batch], seed: int) -> Iterator[Tensor]:
        """Yield (B, 3, 3, H, W): originals, the kept part of them on grey, completions."""
        mask = upper(generator, self.keep)
        done = 0
        with terminal.progress("complete", self.count) as bar:
            for batch in batches:
                assert batch.images is not None
                images = batch.images.to(generator.device)
                completed = generator.complete(
                    images, mask, labels=batch.labels, seed=seed, first=done, batch_size=len(batch)
                )
                self.labels += [] if batch.labels is None else batch.labels.tolist()
                kept = images.masked_fill(~enlarged(mask, generator), 0)
                yield torch.stack([images, kept, completed], dim=1).cpu()
                done += len(batch)
                bar.advance(len(batch))


def complete_tokens(generator: Generator, told: Batch, *, seed: int, first: int = 0, keep: float = 0.5) -> Tensor:
    """Complete pictures that are known by their tokens; returns (B, 3, 3, H, W) as the grid of this pipeline has them.

    The originals, too, are drawn from their codes.
    """
    assert told.tokens is not None
    mask = upper(generator, keep)
    known = told.tokens.masked_fill(~mask.flatten(), -1)
    completed = generator.sample_tokens(told, seed=seed, first=first, known=known)
    whole, drawn = (as_colours(generator.tokenizer.images(each).float()) for each in (told.tokens, completed))
    return torch.stack([whole, whole.masked_fill(~enlarged(mask, generator), 0), drawn], dim=1)


def can_complete(generator: Generator) -> bool:
    """Say whether there is a lower part, and the sampler keeps what is known."""
    return generator.tokenizer.grid[0] > 1 and "known" in inspect.signature(generator.sampler).parameters


def upper(generator: Generator, keep: float) -> Tensor:
    """Return the mask (h, w) of the upper rows of codes: a share of them, but at least one and not all."""
    height, width = generator.tokenizer.grid
    rows = min(max(round(keep * height), 1), height - 1)
    return (torch.arange(height, device=generator.device) < rows)[:, None].expand(height, width)


def enlarged(mask: Tensor, generator: Generator) -> Tensor:
    """Turn a mask of codes into one of pixels."""
    stride = generator.tokenizer.stride
    return mask.repeat_interleave(stride, 0).repeat_interleave(stride, 1)
