"""Stage 2: learn the distribution of the codes of a frozen tokenizer.

VQGAN, https://arxiv.org/abs/2012.09841, section 3.2: maximise the log-likelihood of the codes of an image, row by
row, given the tokens of a condition in front of them.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from vqf.batch import Batch
from vqf.dataloading.order import part_of
from vqf.dataloading.token_shards import Tokens
from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.evaluation.class_accuracy import Judge, reads_labels
from vqf.evaluation.reconstruction import NUMBERS_OF_PRIORS
from vqf.evaluation.validation import Evaluation
from vqf.images import as_colours
from vqf.models.completion import can_complete, complete_tokens
from vqf.models.generator import Generator
from vqf.registry import build
from vqf.training.optimizer_step import Accumulated, Player

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
        which = {"seed": self.config.seed, "first": comm.rank() * len(mine)}
        if told.codes:
            drawn = generator.tokenizer.images(generator.sample_tokens(told.map(lambda each: each[mine]), **which))
        else:
            drawn = generator.sample(len(mine), **which)
        samples = comm.collect(drawn.float(), count)
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
        rows = comm.collect(complete_tokens(generator, some, seed=self.config.seed, first=mine[0]), len(told))
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
            indices = list(range(i, min(i + size, count)))[comm.rank() :: comm.world()]
            if not indices:
                continue
            batch = self.held_out.pick([0] * len(indices), indices).to(self.engine.device)
            assert batch.tokens is not None
            with self.engine.autocast():
                loss = generator.prior.loss(batch.tokens, generator.conditioner(batch))
            total += loss.float() * len(indices)
        return float(comm.total(total)) / count


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
