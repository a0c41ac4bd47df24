"""Stage 1: train a tokenizer (encoder, codebook, decoder).

VQGAN, https://arxiv.org/abs/2012.09841, equations 4 to 7. Without discriminator and adversary it is a VQ-VAE,
https://arxiv.org/abs/1711.00937.
"""

from pathlib import Path

from omegaconf import DictConfig

from vqf.config.access import image_size
from vqf.dataloading.loader import train_batches
from vqf.dataloading.order import ShuffledBatches
from vqf.dataloading.training_target import build_target_data
from vqf.distributed import comm
from vqf.distributed.engine import make_engine
from vqf.evaluation.validation import VALIDATION_TABLE, ValidationResult
from vqf.registry import register
from vqf.runs.resume import check_can_start
from vqf.runs.run_logger import save_metrics
from vqf.terminal import log
from vqf.training.gan import gan_start, warn_never_active
from vqf.training.optimizer_step import describe_model
from vqf.training.task import Batches
from vqf.training.time_budget import resolve_steps
from vqf.training.tokenizer_task import TokenizerTask, build_tokenizer_task
from vqf.training.trainer import train


@register("pipeline", "stage1")
class Stage1:
    """Train a tokenizer. A sweep minimizes its negative validation PSNR."""

    distributed = True

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    def check_can_start(self) -> None:
        check_can_start(self.config, self.run_dir, "stage1")

    def run(self) -> float | None:
        validation = self.train()
        save_metrics(self.run_dir, {VALIDATION_TABLE: validation.scalars})
        return -validation.scalars["psnr"] if "psnr" in validation.scalars else None

    def train(self, subrun: str = "") -> ValidationResult:
        config, engine = self.config, make_engine(self.config)
        data = build_target_data(config, image_size(config))
        split = data.split("train")
        order = ShuffledBatches(
            len(split), config.batch_size, config.seed, comm.rank(), comm.world_size(), accumulate=config.accumulate
        )

        def source(start: int, stop: int) -> Batches:
            loading = {"workers": config.workers, "timeout": config.worker_timeout}
            return train_batches(split, order, start=start, steps=stop, sync_every=config.log.every, **loading)

        def trial() -> TokenizerTask:  # `minutes` measures the speed of a throw-away copy
            return build_tokenizer_task(self.config, data, engine)

        config = resolve_steps(config, self.run_dir, engine, trial, source, gan_start=gan_start(config))
        task = build_tokenizer_task(config, data, engine)
        log.info("%s", describe_model("tokenizer", task.model))
        if task.gan is not None:
            warn_never_active(task.gan, config.steps)
        return train(task, config, self.run_dir, engine, source, subrun)
