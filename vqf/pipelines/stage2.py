"""Stage 2: train a prior on the tokens of a frozen tokenizer.

VQGAN, https://arxiv.org/abs/2012.09841, section 3.2: maximize the log-likelihood of an image's tokens in raster order,
given the prefix of its condition.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from torch import nn

from vqf.config.access import group_nodes
from vqf.config.inherit import inherit
from vqf.dataloading.encode import TokenEncoder, check_image_size, token_folder, tokenize_split
from vqf.dataloading.order import ShuffledBatches
from vqf.dataloading.splits import SPLITS
from vqf.dataloading.token_shards import TokenDataset
from vqf.distributed import comm
from vqf.distributed.engine import Engine, make_engine
from vqf.errors import UserError
from vqf.evaluation.class_accuracy import ClassAccuracyEvaluator
from vqf.evaluation.likelihood import objective, prior_directions
from vqf.evaluation.validation import ValidationResult
from vqf.models.generator import Generator
from vqf.registry import build, register
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.initial_weights import averaged_weights, load_matching
from vqf.runs.load import (
    TOKENIZER_COMPONENTS,
    ConditionTokenizers,
    build_generator,
    find_generator_checkpoint,
    find_tokenizer_checkpoint,
    load_tokenizer,
)
from vqf.runs.resume import check_can_start, find_start_checkpoint
from vqf.runs.retention import parse_best_criterion
from vqf.runs.run_logger import save_metrics
from vqf.terminal import log
from vqf.training.optimizer_step import check_accumulate, describe_model
from vqf.training.prior_task import PriorTask
from vqf.training.task import Batches
from vqf.training.time_budget import resolve_steps
from vqf.training.trainer import train


@register("pipeline", "stage2", defaults=[{"override /optimizer": "gpt"}, {"override /schedule": "cosine"}])
class Stage2:
    """Train a prior on the tokens of a finished run's tokenizer. A sweep minimizes its nats per token.

    Args:
        init: A stage-2 run, from whose prior it starts; by default a new one.
        freeze: Parts of the prior that are not trained: names such as `token_embedding`, or patterns, `blocks.[01].*`.
    """

    distributed = True

    def __init__(
        self, config: DictConfig, run_dir: Path, *, init: str | None = None, freeze: Sequence[str] = ()
    ) -> None:
        self.config, self.run_dir, self.init, self.freeze = config, run_dir, init, freeze

    def check_can_start(self) -> None:
        config = self._inherited_config(find_tokenizer_checkpoint(self.config.run).config)
        check_can_start(config, self.run_dir, "stage2")

    def run(self) -> float | None:
        scalars = self.train().scalars
        save_metrics(self.run_dir, {"codes": scalars})
        return objective(scalars)

    def train(self, subrun: str = "") -> ValidationResult:
        checkpoint = find_tokenizer_checkpoint(self.config.run)
        config = self._inherited_config(checkpoint.config)
        # Before all work: a wrong name must not show after hours of tokenizing.
        parse_best_criterion(config.checkpoint.best, prior_directions(config))
        engine = make_engine(config)
        tokenizer = engine.prepare(load_tokenizer(checkpoint))
        check_image_size(config, tokenizer)
        data = build("data", config.data, image_size=tokenizer.image_size, seed=config.seed)
        torch.manual_seed(config.seed)
        condition_tokenizers = ConditionTokenizers()
        generator = build_generator(config, tokenizer, data.classes, condition_tokenizers).to(engine.device)
        encoder, folder = TokenEncoder(tokenizer, generator.conditioner, engine), token_folder(config, self.run_dir)
        tokens = {name: tokenize_split(encoder, data.split(name), name, folder, config) for name in SPLITS}
        metadata = {
            "classes": list(data.classes),
            "image_size": list(tokenizer.image_size),
            "channels": tokenizer.channels,
            "output": tokenizer.output,
            "condition_tokenizers": condition_tokenizers.specs,
            "tokenizer": tokenizer.fingerprint(),
            "data": data.split("train").fingerprint,
            "validation_fingerprint": data.split("validation").fingerprint,
        }
        metadata["crop_extent"] = generator.crop_extent = tokens["train"].mean_crop_extent()
        class_evaluator = ClassAccuracyEvaluator(data, tokens, config, engine)
        return self._train(config, engine, generator, tokens, metadata, class_evaluator, subrun)

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

        def source(start: int, stop: int) -> Batches:
            return tokens["train"].batches(order, start, stop)

        def trial() -> PriorTask:  # `minutes` measures the speed of a copy: the model itself must not move
            return PriorTask(
                copy.deepcopy(generator), tokens["validation"], metadata, config, engine, freeze=self.freeze
            )

        config = resolve_steps(config, self.run_dir, engine, trial, source)
        self._load_initial_weights(config, generator, metadata["tokenizer"])
        task = PriorTask(generator, tokens["validation"], metadata, config, engine, class_evaluator, self.freeze)
        return train(task, config, self.run_dir, engine, source, subrun)

    def _load_initial_weights(self, config: DictConfig, generator: Generator, tokenizer: str) -> None:
        checkpoint = self._source
        if checkpoint is None or find_start_checkpoint(config, self.run_dir, "stage2") is not None:
            return
        if checkpoint.state.get("tokenizer") != tokenizer:
            log.warning("init=%s: its prior was trained on the tokens of another tokenizer", self.init)
        assert isinstance(generator.prior, nn.Module)
        load_matching(generator.prior, checkpoint, averaged_weights(checkpoint))
        if checkpoint.has_weights("conditioner") and generator.conditioner.state_dict():
            load_matching(generator.conditioner, checkpoint, "conditioner")

    @cached_property  # opening a checkpoint verifies all of its files
    def _source(self) -> Checkpoint | None:
        return None if self.init is None else find_generator_checkpoint(self.init)

    def _inherited_config(self, run_config: DictConfig) -> DictConfig:
        config = inherit(self.config, run_config, ["data", "image_size"])
        prior_config = run_config if self._source is None else self._source.config
        config = inherit(config, prior_config, ["model.prior", "model.conditioner"])
        with open_dict(config):
            for kind in TOKENIZER_COMPONENTS:  # must fit the weights, whatever the command line says
                config.model[kind] = run_config.model[kind]
            config.model.projection = run_config.model.get("projection", 1)
        check_accumulate(config)
        if config.model.prior is None or not group_nodes(config.model, "conditioner"):
            raise UserError(
                "model.prior and model.conditioner: stage 2 needs both; give model/prior=gpt model/conditioner=none"
            )
        return config
