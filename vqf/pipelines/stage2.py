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
from vqf.config.access import chosen
from vqf.config.inherit import inherit
from vqf.dataloading.encode import Coder, check_size, token_folder, tokenize_part
from vqf.dataloading.image_files import PARTS
from vqf.dataloading.order import Order
from vqf.dataloading.token_shards import Tokens
from vqf.distributed import comm
from vqf.distributed.engine import Engine, make_engine
from vqf.errors import UserError
from vqf.evaluation.class_accuracy import Judge
from vqf.evaluation.reconstruction import NUMBERS_OF_PRIORS
from vqf.evaluation.validation import Evaluation
from vqf.models.generator import Generator
from vqf.registry import build, register
from vqf.runs.load import TOKENIZER_PARTS, Coders, build_generator, find_tokenizer, load_tokenizer
from vqf.runs.resume import refuse
from vqf.runs.retention import best_by
from vqf.runs.run_logger import save_numbers
from vqf.terminal import log
from vqf.training.optimizer_step import check_accumulate, describe
from vqf.training.prior_task import PriorStage
from vqf.training.time_budget import fix_steps
from vqf.training.trainer import train


@register("pipeline", "stage2", defaults=[{"override /optimizer": "gpt"}, {"override /schedule": "cosine"}])
class Stage2:
    """Train a prior on the codes of a finished run's tokenizer. Returns nats per token, for sweeps."""

    parallel = True

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    def refuse(self) -> None:
        """Refuse what would spoil the run in the folder, before anything is written there."""
        config = self._inherit(find_tokenizer(self.config.run).config)
        refuse(config, self.run_dir, "stage2")

    def run(self) -> float | None:
        """Train, evaluate, save."""
        scalars = self.train().scalars
        save_numbers(self.run_dir, {"codes": scalars})
        return scalars["nats_per_token"]

    def train(self, part: str = "") -> Evaluation:
        """Train to the end and return the last look at held-out pictures.

        Args:
            part: What this is of a longer run, for loggers.
        """
        best_by(self.config.checkpoint.best, NUMBERS_OF_PRIORS)  # a slip must not show after hours
        checkpoint = find_tokenizer(self.config.run)
        config = self._inherit(checkpoint.config)
        engine = make_engine(config)
        tokenizer = engine.place(load_tokenizer(checkpoint))
        check_size(config, tokenizer)
        data = build("data", config.data, image_size=tokenizer.image_size, seed=config.seed)
        torch.manual_seed(config.seed)
        coders = Coders()
        generator = build_generator(config, tokenizer, data.classes, coders).to(engine.device)
        coder, folder = Coder(tokenizer, generator.conditioner, engine), token_folder(config, self.run_dir)
        cached = {part: tokenize_part(coder, data.split(part), part, folder, config) for part in PARTS}
        facts = {
            "classes": list(data.classes),
            "image_size": list(tokenizer.image_size),
            "channels": tokenizer.channels,
            "coders": coders.facts,
            "tokenizer": tokenizer.fingerprint(),
            "data": data.split("train").fingerprint,
            "held_out": data.split("validation").fingerprint,
        }
        facts["extent"] = generator.extent = cached["train"].extent()
        judge = Judge(data, cached, config, engine)
        return self._train(config, engine, generator, cached, facts, judge, part)

    def _train(
        self,
        config: DictConfig,
        engine: Engine,
        generator: Generator,
        cached: Mapping[str, Tokens],
        facts: Mapping[str, Any],
        judge: Judge,
        part: str,
    ) -> Evaluation:
        assert isinstance(generator.prior, nn.Module)
        log.info("%s", describe("prior", generator.prior))
        order = Order(
            *(len(cached["train"]), config.batch_size, config.seed, comm.rank(), comm.world()),
            accumulate=config.accumulate,
        )

        def source(start: int, stop: int) -> Iterator[Batch]:
            return cached["train"].batches(order, start, stop)

        def trial() -> PriorStage:
            return PriorStage(copy.deepcopy(generator), cached["validation"], facts, config, engine)

        config = fix_steps(config, self.run_dir, engine, trial, source)
        stage = PriorStage(generator, cached["validation"], facts, config, engine, judge)
        return train(stage, config, self.run_dir, engine, source, part)

    def _inherit(self, run: DictConfig) -> DictConfig:
        config = inherit(self.config, run, ["data", "image_size", "model.prior", "model.conditioner"])
        with open_dict(config):
            for part in TOKENIZER_PARTS:  # what the weights were trained as, whatever the command line says
                config.model[part] = run.model[part]
        check_accumulate(config)
        if config.model.prior is None or not chosen(config.model, "conditioner"):
            raise UserError(
                "model.prior and model.conditioner: stage 2 needs both, model/prior=gpt model/conditioner=none"
            )
        return config
