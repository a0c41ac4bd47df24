"""Stage 2: learn the distribution of the codes of a frozen tokenizer.

VQGAN, https://arxiv.org/abs/2012.09841, section 3.2: maximise the log-likelihood of the codes of an image, row by
row, given the tokens of a condition in front of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn
from torch.optim import Optimizer

from vqf.errors import UserError
from vqf.generator import Generator
from vqf.pipelines.common import Accumulated, check_accumulate, describe, start_run, step_optimizer
from vqf.pipelines.engine import Engine, make_engine
from vqf.pipelines.inherit import inherit
from vqf.pipelines.loader import Order
from vqf.pipelines.loop import Evaluation, Loop
from vqf.pipelines.restore import TOKENIZER_PARTS, build_generator, find_tokenizer, load_tokenizer
from vqf.pipelines.tokens import Tokens, tokenize
from vqf.protocols import Batch
from vqf.registry import build, register
from vqf.terminal import log
from vqf.tokenizer import Tokenizer

SHOWN = 32  # samples drawn at every look


class PriorStage:
    """One player: the prior, on cached tokens."""

    kind = "stage2"

    def __init__(
        self, generator: Generator, held_out: Tokens, facts: Mapping[str, Any], config: DictConfig, engine: Engine
    ):
        self.generator, self.held_out, self.config, self.engine = generator, held_out, config, engine
        assert isinstance(generator.prior, nn.Module)
        self.model = generator.prior
        self.loss = torch.compile(self.model.loss, dynamic=False) if config.compile else self.model.loss
        self.modules: dict[str, nn.Module] = {"model": self.model, "tokenizer": generator.tokenizer}
        if isinstance(generator.conditioner, nn.Module) and generator.conditioner.state_dict():
            self.modules["conditioner"] = generator.conditioner
        self.optimizers: dict[str, Optimizer] = {
            "model": build("optimizer", config.optimizer, params=decay_groups(self.model))
        }
        self.facts = facts

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Move the prior once; returns what to log."""
        total = Accumulated()
        self.generator.train()
        self.generator.tokenizer.eval()
        pieces = batch.chunk(self.config.accumulate)
        for piece in pieces:
            loss = self._loss(piece)
            (loss / len(pieces)).backward()
            total.add({"loss": loss}, 1 / len(pieces))
        total.add({"gradient": step_optimizer(self.optimizers["model"], self.config.clip)})
        return total.values

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Return nats per token on held-out pictures, and samples."""
        conditioner, sampler = self.generator.conditioner, self.generator.sampler
        generator = Generator(self.generator.tokenizer, conditioner, model, sampler, self.generator.classes).eval()  # type: ignore[arg-type]
        loss = self._held_out_loss(generator)
        scalars = {"nats_per_token": loss, "log_vocabulary": math.log(generator.tokenizer.vocab_size)}
        with self.engine.autocast():
            samples = generator.sample(SHOWN, seed=self.config.seed)
        return Evaluation(scalars, {"samples": samples.float()})

    def _loss(self, batch: Batch) -> Tensor:
        assert batch.tokens is not None
        prefix = self.generator.conditioner(batch)
        with self.engine.autocast():
            return self.loss(batch.tokens, prefix)

    def _held_out_loss(self, generator: Generator) -> float:
        count, size = len(self.held_out), self.config.batch_size
        total = torch.zeros((), device=self.engine.device)
        for i in range(0, count, size):
            indices = list(range(i, min(i + size, count)))
            batch = self.held_out.pick([0] * len(indices), indices).to(self.engine.device)
            assert batch.tokens is not None
            with self.engine.autocast():
                loss = generator.prior.loss(batch.tokens, generator.conditioner(batch))
            total += loss.float() * len(indices)
        return float(total) / count


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

    def __init__(self, config: DictConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    def run(self) -> float | None:
        """Train, evaluate, save."""
        return self.train().scalars["nats_per_token"]

    def train(self) -> Evaluation:
        """Train to the end and return the last look at held-out pictures."""
        checkpoint = find_tokenizer(self.config.run)
        config = self._inherit(checkpoint.config)
        engine = make_engine(config)
        tokenizer = engine.place(load_tokenizer(checkpoint))
        data = build("data", config.data, image_size=tokenizer.image_size, seed=config.seed)
        cached = {
            name: self._tokenize(config, tokenizer, data.split(name), name, engine) for name in ("train", "validation")
        }
        facts = {
            "classes": list(data.classes),
            "image_size": list(tokenizer.image_size),
            "tokenizer": tokenizer.fingerprint(),
            "data": data.split("train").fingerprint,
        }
        return self._train(config, engine, tokenizer, cached, facts)

    def _train(
        self,
        config: DictConfig,
        engine: Engine,
        tokenizer: Tokenizer,
        cached: Mapping[str, Tokens],
        facts: Mapping[str, Any],
    ) -> Evaluation:
        torch.manual_seed(config.seed)
        classes: Sequence[str] = facts["classes"]
        generator = build_generator(config, tokenizer, classes).to(engine.device)
        assert isinstance(generator.prior, nn.Module)
        log.info("%s", describe("prior", generator.prior))
        stage = PriorStage(generator, cached["validation"], facts, config, engine)
        order = Order(len(cached["train"]), config.batch_size, config.seed)
        with start_run(config, self.run_dir) as journal:
            loop = Loop(stage, config, self.run_dir, engine, journal)

            def source(start: int, stop: int) -> Iterator[Batch]:
                return cached["train"].batches(order, start, stop)

            return loop.run(source)

    def _inherit(self, run: DictConfig) -> DictConfig:
        config = inherit(self.config, run, ["data", "image_size", "model.prior", "model.conditioner"])
        with open_dict(config):
            for part in TOKENIZER_PARTS:  # what the weights were trained as, whatever the command line says
                config.model[part] = run.model[part]
        check_accumulate(config)
        if config.model.prior is None or config.model.conditioner is None:
            raise UserError(
                "model.prior and model.conditioner: stage 2 needs both, model/prior=gpt model/conditioner=none"
            )
        return config

    def _tokenize(self, config: DictConfig, tokenizer: Tokenizer, split: Any, name: str, engine: Engine) -> Tokens:
        folder = self.run_dir / "tokens" if config.tokens.root is None else Path(config.tokens.root)
        return tokenize(
            tokenizer,
            split,
            folder / f"{name}.safetensors",
            views=config.tokens.views if name == "train" else 1,
            batch_size=config.batch_size,
            workers=config.workers,
            engine=engine,
        )
