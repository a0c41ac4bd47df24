"""Stage 2: learn the distribution of the codes of a frozen tokenizer.

VQGAN, https://arxiv.org/abs/2012.09841, section 3.2: maximise the log-likelihood of the codes of an image, row by
row, given the tokens of a condition in front of them.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from torch import nn

from vqf.batch import Batch
from vqf.config.access import group_nodes
from vqf.config.inherit import inherit
from vqf.dataloading.encode import TokenEncoder, check_image_size, token_folder, tokenize_split
from vqf.dataloading.image_files import SPLITS
from vqf.dataloading.order import ShuffledBatches
from vqf.dataloading.token_shards import TokenDataset
from vqf.distributed import comm
from vqf.distributed.engine import Engine, make_engine
from vqf.errors import UserError
from vqf.evaluation.class_accuracy import ClassAccuracyEvaluator
from vqf.evaluation.reconstruction import PRIOR_METRIC_DIRECTIONS
from vqf.evaluation.validation import ValidationResult
from vqf.models.generator import Generator
from vqf.registry import build, register
from vqf.runs.load import (
    TOKENIZER_COMPONENTS,
    ConditionTokenizers,
    build_generator,
    find_tokenizer_checkpoint,
    load_tokenizer,
)
from vqf.runs.resume import check_can_start
from vqf.runs.retention import parse_best_criterion
from vqf.runs.run_logger import save_metrics
from vqf.terminal import log
from vqf.training.optimizer_step import check_accumulate, describe_model
from vqf.training.prior_task import PriorTask
from vqf.training.time_budget import resolve_steps
from vqf.training.trainer import train


@register("pipeline", "stage2", defaults=[{"override /optimizer": "gpt"}, {"override /schedule": "cosine"}])
class Stage2:
    """Train a prior on the codes of a finished run's tokenizer. Returns nats per token, for sweeps."""

    distributed = True

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    def check_can_start(self) -> None:
        """Refuse what would spoil the run in the folder, before anything is written there."""
        config = self._inherited_config(find_tokenizer_checkpoint(self.config.run).config)
        check_can_start(config, self.run_dir, "stage2")

    def run(self) -> float | None:
        """Train, evaluate, save."""
        scalars = self.train().scalars
        save_metrics(self.run_dir, {"codes": scalars})
        return scalars["nats_per_token"]

    def train(self, subrun: str = "") -> ValidationResult:
        """Train to the end and return the last look at held-out images.

        Args:
            subrun: What this is of a longer run, for loggers.
        """
        parse_best_criterion(self.config.checkpoint.best, PRIOR_METRIC_DIRECTIONS)  # a slip must not show after hours
        checkpoint = find_tokenizer_checkpoint(self.config.run)
        config = self._inherited_config(checkpoint.config)
        engine = make_engine(config)
        tokenizer = engine.prepare(load_tokenizer(checkpoint))
        check_image_size(config, tokenizer)
        data = build("data", config.data, image_size=tokenizer.image_size, seed=config.seed)
        torch.manual_seed(config.seed)
        coders = ConditionTokenizers()
        generator = build_generator(config, tokenizer, data.classes, coders).to(engine.device)
        coder, folder = TokenEncoder(tokenizer, generator.conditioner, engine), token_folder(config, self.run_dir)
        cached = {part: tokenize_split(coder, data.split(part), part, folder, config) for part in SPLITS}
        facts = {
            "classes": list(data.classes),
            "image_size": list(tokenizer.image_size),
            "channels": tokenizer.channels,
            "condition_tokenizers": coders.specs,
            "tokenizer": tokenizer.fingerprint(),
            "data": data.split("train").fingerprint,
            "validation_fingerprint": data.split("validation").fingerprint,
        }
        facts["crop_extent"] = generator.crop_extent = cached["train"].mean_crop_extent()
        judge = ClassAccuracyEvaluator(data, cached, config, engine)
        return self._train(config, engine, generator, cached, facts, judge, subrun)

    def _train(
        self,
        config: DictConfig,
        engine: Engine,
        generator: Generator,
        tokens: Mapping[str, TokenDataset],
        metadata: Mapping[str, Any],
        class_evaluator: ClassAccuracyEvaluator,
        subrun: str,
    ) -> ValidationResult:
        assert isinstance(generator.prior, nn.Module)
        log.info("%s", describe_model("prior", generator.prior))
        order = ShuffledBatches(
            *(len(tokens["train"]), config.batch_size, config.seed, comm.rank(), comm.world_size()),
            accumulate=config.accumulate,
        )

        def source(start: int, stop: int) -> Iterator[Batch]:
            return tokens["train"].batches(order, start, stop)

        def trial() -> PriorTask:
            return PriorTask(copy.deepcopy(generator), tokens["validation"], metadata, config, engine)

        config = resolve_steps(config, self.run_dir, engine, trial, source)
        stage = PriorTask(generator, tokens["validation"], metadata, config, engine, class_evaluator)
        return train(stage, config, self.run_dir, engine, source, subrun)

    def _inherited_config(self, run_config: DictConfig) -> DictConfig:
        config = inherit(self.config, run_config, ["data", "image_size", "model.prior", "model.conditioner"])
        with open_dict(config):
            for part in TOKENIZER_COMPONENTS:  # what the weights were trained as, whatever the command line says
                config.model[part] = run_config.model[part]
        check_accumulate(config)
        if config.model.prior is None or not group_nodes(config.model, "conditioner"):
            raise UserError(
                "model.prior and model.conditioner: stage 2 needs both, model/prior=gpt model/conditioner=none"
            )
        return config
