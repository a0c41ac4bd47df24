"""Stage 2: learn the distribution of the codes of a frozen tokenizer.

VQGAN, https://arxiv.org/abs/2012.09841, section 3.2: maximise the log-likelihood of the codes of an image, row by
row, given the tokens of a condition in front of them.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn
from torch.optim import Optimizer

from vqf import ranks
from vqf.errors import UserError
from vqf.generator import Generator
from vqf.pipelines.budget import fix_steps
from vqf.pipelines.classes import Judge, reads_labels
from vqf.pipelines.common import Accumulated, check_accumulate, chosen, describe, save_numbers
from vqf.pipelines.complete import can_complete, complete_tokens
from vqf.pipelines.engine import Engine, make_engine
from vqf.pipelines.evaluation import NUMBERS_OF_PRIORS
from vqf.pipelines.files import PARTS
from vqf.pipelines.inherit import inherit
from vqf.pipelines.loop import Evaluation, train
from vqf.pipelines.order import Order, part_of
from vqf.pipelines.pictures import as_colours
from vqf.pipelines.player import Player
from vqf.pipelines.restore import TOKENIZER_PARTS, Coders, build_generator, find_tokenizer, load_tokenizer
from vqf.pipelines.resume import refuse
from vqf.pipelines.retention import best_by
from vqf.pipelines.tokenize import Coder, check_size, token_folder, tokenize_part
from vqf.pipelines.tokens import Tokens
from vqf.protocols import Batch
from vqf.registry import build, register
from vqf.terminal import log

SHOWN = 32  # samples drawn at every look
COMPLETED = 9  # held-out pictures completed at every look
COMPLETIONS = "Held-out pictures as their codes draw them: whole, the part that the prior is shown, and its answer."


class PriorStage:
    """One player: the prior, on cached tokens."""

    kind = "stage2"

    def __init__(
        self,
        generator: Generator,
        held_out: Tokens,
        facts: Mapping[str, Any],
        config: DictConfig,
        engine: Engine,
        judge: Judge | None = None,
    ) -> None:
        self.generator, self.held_out, self.config, self.engine = generator, held_out, config, engine
        assert isinstance(generator.prior, nn.Module)
        self.model = generator.prior
        self.loss = engine.spread(self.model, "loss", compiled=config.compile)  # before the optimizer is built
        self.modules: dict[str, nn.Module] = {"model": self.model, "tokenizer": generator.tokenizer}
        if generator.conditioner.state_dict():
            self.modules["conditioner"] = generator.conditioner
        optimizer = build("optimizer", config.optimizer, params=decay_groups(self.model))
        self.players = {"model": Player(optimizer, [self.model], config)}
        self.optimizers: dict[str, Optimizer] = {"model": optimizer}
        self.higher_is_better = NUMBERS_OF_PRIORS
        self.facts, self.judge = facts, judge

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Move the prior once; returns what to log."""
        total = Accumulated()
        self.generator.train()
        self.generator.tokenizer.eval()
        self.players["model"].begin()
        pieces = batch.chunk(self.config.accumulate)
        for i, piece in enumerate(pieces, 1):
            with self.engine.collecting(self.loss, more=i < len(pieces)):
                loss = self._loss(piece)
                (loss / len(pieces)).backward()
            total.add({"loss": loss}, 1 / len(pieces))
        total.add({"gradient": self.players["model"].move(total.values)})
        return total.values

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Return nats per token on held-out pictures, and samples."""
        generator = self._generator(model)
        loss = self._held_out_loss(generator)
        scalars = {"nats_per_token": loss, "log_vocabulary": math.log(generator.tokenizer.vocab_size)}
        with self.engine.autocast():
            return Evaluation(scalars, self._samples(generator) | self._completions(generator), self._said(generator))

    def conclude(self, model: nn.Module) -> Evaluation:
        """Return how often samples are of the class that was asked for, where classes are asked for."""
        verdict = None if self.judge is None else self.judge(self._generator(model))
        if verdict is None:
            return Evaluation({})
        seen = {"names": self.generator.classes, "confusion": verdict.confusion.tolist()}
        return Evaluation(verdict.scalars(), details={"classes": seen})

    def _generator(self, model: nn.Module) -> Generator:
        parts = self.generator
        like = (parts.tokenizer, parts.conditioner, model, parts.sampler, parts.classes)
        return Generator(*like, extent=parts.extent).eval()  # type: ignore[arg-type]

    def _samples(self, generator: Generator) -> dict[str, Tensor]:
        """Draw pictures by held-out conditions: each beside what it was told, where that can be seen."""
        told, shown = self._told(), generator.conditioner.show
        count = len(told) if told.codes else SHOWN
        mine = part_of(count)  # of several processes each draws some
        which = {"seed": self.config.seed, "first": ranks.rank() * len(mine)}
        if told.codes:
            drawn = generator.tokenizer.images(generator.sample_tokens(told.map(lambda each: each[mine]), **which))
        else:
            drawn = generator.sample(len(mine), **which)
        samples = ranks.collect(drawn.float(), count)
        if samples is None or not told.codes:
            return {} if samples is None else {"samples": samples}
        rows = [as_colours(each) for each in shown(told).values()] + [samples]
        return {"samples": samples, "conditions": rearrange(rows, "rows b c h w -> (b rows) c h w")}

    def _completions(self, generator: Generator) -> dict[str, Tensor]:
        """Complete held-out pictures from their upper half, where the sampler keeps codes."""
        if not can_complete(generator):
            return {}
        told = self._told(COMPLETED)
        mine = part_of(len(told))
        some = told.map(lambda each: each[mine])
        rows = ranks.collect(complete_tokens(generator, some, seed=self.config.seed, first=mine[0]), len(told))
        return {} if rows is None else {"completions": rearrange(rows, "b three c h w -> (b three) c h w")}

    def _said(self, generator: Generator) -> dict[str, Any]:
        """Return what is written over and under the pictures: the classes, where the prior is told them."""
        told, names = self._told(), generator.classes
        if not reads_labels(generator, told):
            return {"completions": {"caption": COMPLETIONS}}
        held_out = self._told(COMPLETED).labels
        samples = told.labels if told.codes else torch.arange(SHOWN) % len(names)
        assert samples is not None and held_out is not None
        return {
            "samples": {"labels": [names[each] for each in samples.tolist()]},
            "completions": {"caption": COMPLETIONS, "captions": [names[each] for each in held_out.tolist()]},
        }

    def _told(self, most: int = SHOWN) -> Batch:
        count = min(most, len(self.held_out))
        spread = [i * len(self.held_out) // count for i in range(count)]
        return self.held_out.pick([0] * count, spread).to(self.engine.device)

    def _loss(self, batch: Batch) -> Tensor:
        assert batch.tokens is not None
        prefix = self.generator.conditioner(batch)
        with self.engine.autocast():
            return self.loss(batch.tokens, prefix)

    def _held_out_loss(self, generator: Generator) -> float:
        count, size = len(self.held_out), self.config.batch_size
        total = torch.zeros((), device=self.engine.device)
        for i in range(0, count, size):
            indices = list(range(i, min(i + size, count)))[ranks.rank() :: ranks.world()]
            if not indices:
                continue
            batch = self.held_out.pick([0] * len(indices), indices).to(self.engine.device)
            assert batch.tokens is not None
            with self.engine.autocast():
                loss = generator.prior.loss(batch.tokens, generator.conditioner(batch))
            total += loss.float() * len(indices)
        return float(ranks.total(total)) / count


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Split parameters into those that weight decay may shrink, weights of linear layers, and all others.

    As minGPT and taming-transformers do: never biases, norms, embeddings and positions.
    """
    linear = {id(each.weight) for each in module.modules() if isinstance(each, nn.Linear)}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    shrinks = [parameter for parameter in trained if id(parameter) in linear]
    others = [parameter for parameter in trained if id(parameter) not in linear]
    groups: list[dict[str, Any]] = [{"params": shrinks}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


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
            *(len(cached["train"]), config.batch_size, config.seed, ranks.rank(), ranks.world()),
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
