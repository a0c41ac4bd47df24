"""Stage 1: learn a codebook, and to draw images from it.

VQGAN, https://arxiv.org/abs/2012.09841, equations 4 to 7. Without discriminator and adversary it is a VQ-VAE,
https://arxiv.org/abs/1711.00937.
"""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from vqf.batch import Batch
from vqf.config.access import image_size
from vqf.dataloading.loader import batches
from vqf.dataloading.order import Order
from vqf.dataloading.subject import build_subject
from vqf.distributed import comm
from vqf.distributed.engine import make_engine
from vqf.evaluation.validation import Evaluation
from vqf.registry import register
from vqf.runs.resume import refuse
from vqf.runs.run_logger import save_numbers
from vqf.terminal import log
from vqf.training.gan import check_game, game_begins
from vqf.training.optimizer_step import describe
from vqf.training.time_budget import fix_steps
from vqf.training.tokenizer_task import TokenizerStage, make_stage
from vqf.training.trainer import train


@register("pipeline", "stage1")
class Stage1:
    """Train a tokenizer. Returns the first validation metric that falls as pictures get better, for sweeps."""

    parallel = True

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    def refuse(self) -> None:
        """Refuse what would spoil the run in the folder, before anything is written there."""
        refuse(self.config, self.run_dir, "stage1")

    def run(self) -> float | None:
        """Train, evaluate, save."""
        evaluation = self.train()
        save_numbers(self.run_dir, {"held-out pictures": evaluation.scalars})
        return -evaluation.scalars["psnr"] if "psnr" in evaluation.scalars else None

    def train(self, part: str = "") -> Evaluation:
        """Train to the end and return the last look at held-out pictures.

        Args:
            part: What this is of a longer run, for loggers.
        """
        config, engine = self.config, make_engine(self.config)
        data = build_subject(config, image_size(config))
        split = data.split("train")
        order = Order(
            len(split), config.batch_size, config.seed, comm.rank(), comm.world(), accumulate=config.accumulate
        )

        def source(start: int, stop: int) -> Iterator[Batch]:
            loading = {"workers": config.workers, "timeout": config.worker_timeout}
            return batches(split, order, start=start, steps=stop, every=config.log.every, **loading)

        def trial() -> TokenizerStage:
            return make_stage(self.config, data, engine)

        config = fix_steps(config, self.run_dir, engine, trial, source, late_from=game_begins(config))
        stage = make_stage(config, data, engine)
        log.info("%s", describe("tokenizer", stage.model))
        if stage.critic is not None:
            check_game(stage.critic, config.steps)
        return train(stage, config, self.run_dir, engine, source, part)
