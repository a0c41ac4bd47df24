"""Stage 1: train a tokenizer (encoder, codebook, decoder).

VQGAN, https://arxiv.org/abs/2012.09841, equations 4 to 7. Without discriminator and adversary it is a VQ-VAE,
https://arxiv.org/abs/1711.00937.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig

from vqf.config.access import image_size
from vqf.config.inherit import inherit
from vqf.dataloading.loader import train_batches
from vqf.dataloading.order import ShuffledBatches
from vqf.dataloading.training_target import build_target_data
from vqf.distributed import comm
from vqf.distributed.engine import make_engine
from vqf.evaluation.validation import VALIDATION_TABLE, ValidationResult
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import Pretrained
from vqf.registry import register
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.initial_weights import load_matching, tokenizer_weights
from vqf.runs.load import find_stage1_checkpoint
from vqf.runs.resume import check_can_start, find_start_checkpoint
from vqf.runs.run_logger import save_metrics
from vqf.terminal import log
from vqf.training.gan import GANModule, gan_start, warn_never_active
from vqf.training.optimizer_step import describe_model
from vqf.training.task import Batches
from vqf.training.time_budget import resolve_steps
from vqf.training.tokenizer_task import TokenizerTask, build_tokenizer_task
from vqf.training.trainer import train

TRAINED_KINDS = ("encoder", "decoder", "quantizer", "projection", "loss", "discriminator", "adversary", "regularizer")
INHERITED = ["data", "image_size", "target", *(f"model.{kind}" for kind in TRAINED_KINDS)]  # from `run`


@register("pipeline", "stage1")
class Stage1:
    """Train a tokenizer. A sweep minimizes its negative validation PSNR.

    With `run=PATH` it starts from the weights of that run, whose model, data and image size it takes over where the
    command line sets no other.

    Args:
        freeze: Parts of the tokenizer that are not trained: names such as `encoder`, or patterns, `decoder.up.[34].*`.
        keep_discriminator: With `run=PATH`, start from its discriminator too, not from a new one.
    """

    distributed = True

    def __init__(
        self, config: DictConfig, run_dir: Path, *, freeze: Sequence[str] = (), keep_discriminator: bool = True
    ) -> None:
        self.config, self.run_dir, self.freeze, self.keep_discriminator = config, run_dir, freeze, keep_discriminator

    def check_can_start(self) -> None:
        check_can_start(self._inherited_config(), self.run_dir, "stage1")

    def run(self) -> float | None:
        validation = self.train()
        save_metrics(self.run_dir, {VALIDATION_TABLE: validation.scalars})
        return -validation.scalars["psnr"] if "psnr" in validation.scalars else None

    def train(self, subrun: str = "") -> ValidationResult:
        config = self._inherited_config()
        engine = make_engine(config)
        data = build_target_data(config, image_size(config))
        split = data.split("train")
        order = ShuffledBatches(
            len(split), config.batch_size, config.seed, comm.rank(), comm.world_size(), accumulate=config.accumulate
        )

        def source(start: int, stop: int) -> Batches:
            loading = {"workers": config.workers, "timeout": config.worker_timeout}
            return train_batches(split, order, start=start, steps=stop, sync_every=config.log.every, **loading)

        def trial() -> TokenizerTask:  # `minutes` measures the speed of a throw-away copy
            return build_tokenizer_task(configured, data, engine, self.freeze)

        configured = config
        config = resolve_steps(config, self.run_dir, engine, trial, source, gan_start=gan_start(config))
        task = build_tokenizer_task(config, data, engine, self.freeze, self._initializer(config))
        log.info("%s", describe_model("tokenizer", task.model))
        if task.gan is not None:
            warn_never_active(task.gan, config.steps)
        return train(task, config, self.run_dir, engine, source, subrun)

    @cached_property  # opening a checkpoint verifies all of its files
    def _source(self) -> Checkpoint | None:
        return None if self.config.run is None else find_stage1_checkpoint(self.config.run)

    def _inherited_config(self) -> DictConfig:
        return self.config if self._source is None else inherit(self.config, self._source.config, INHERITED)

    def _initializer(self, config: DictConfig) -> Callable[[Tokenizer, GANModule | None], None] | None:
        """What loads the weights of `run`, or those that the encoder brings; None for a run that is resumed."""
        if find_start_checkpoint(config, self.run_dir, "stage1") is not None:
            return None
        if (checkpoint := self._source) is None:
            return load_pretrained

        def load(tokenizer: Tokenizer, gan: GANModule | None) -> None:
            load_matching(tokenizer, checkpoint, tokenizer_weights(checkpoint))
            if gan is not None and self.keep_discriminator and checkpoint.has_weights("discriminator"):
                load_matching(gan, checkpoint, "discriminator")
            elif gan is not None:
                log.info("the discriminator starts anew")

        return load


def load_pretrained(tokenizer: Tokenizer, gan: GANModule | None) -> None:
    """Load the weights that an encoder brings."""
    if isinstance(tokenizer.encoder, Pretrained):
        tokenizer.encoder.load_pretrained()
