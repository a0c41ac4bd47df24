"""Draw new pictures from a finished stage-2 run."""

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from vqf import terminal
from vqf.errors import UserError
from vqf.generator import Generator
from vqf.pipelines.common import start_run
from vqf.pipelines.engine import make_engine
from vqf.pipelines.inherit import inherit
from vqf.pipelines.pictures import save_pictures
from vqf.pipelines.restore import find_generator, load_generator
from vqf.registry import register
from vqf.terminal import log


@register("pipeline", "sample")
class Sample:
    """Draw new pictures from the prior of a run.

    Args:
        count: How many.
        label: One class for all, by number or name; by default classes take turns.
        size: Height and width in pixels as `size=[512,768]`, or one number for both; by default as in training. Larger
            pictures want `sampler=sliding_window`.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        count: int = 64,
        label: str | None = None,
        size: int | Sequence[int] | None = None,
    ) -> None:
        if count < 1:
            raise UserError(f"count={count}: draw at least one picture")
        self.config, self.run_dir, self.count, self.label, self.size = config, run_dir, count, label, size

    def run(self) -> None:
        """Write `samples/*.png` and a grid of them."""
        checkpoint = find_generator(self.config.run)
        config = inherit(self.config, checkpoint.config, ["sampler", "batch_size"])
        engine = make_engine(config)
        generator = load_generator(checkpoint, config.sampler).to(engine.device)
        label = None if self.label is None else generator.class_index(self.label)
        pictures = draw(generator, self.count, label, config.seed, config.batch_size, self.size)
        save_pictures(pictures, self.run_dir / "samples", (f"{i:06d}" for i in range(self.count)))
        with start_run(config, self.run_dir) as journal:
            journal.images(0, "samples", pictures[:64])
        log.info("%d pictures in %s", self.count, self.run_dir / "samples")


def draw(
    generator: Generator,
    count: int,
    label: int | None,
    seed: int,
    batch_size: int,
    size: int | Sequence[int] | None = None,
) -> torch.Tensor:
    """Draw pictures in batches, with a progress bar."""
    pieces = []
    with terminal.progress("sample", count) as bar:
        for i in range(0, count, batch_size):
            now = min(batch_size, count - i)
            pieces.append(generator.sample(now, label=label, seed=seed, first=i, batch_size=now, size=size))
            bar.advance(now)
    return torch.cat(pieces)
