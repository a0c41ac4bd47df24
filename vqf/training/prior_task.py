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
from vqf.dataloading.order import indices_for_rank
from vqf.dataloading.token_shards import TokenDataset
from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.evaluation.class_accuracy import ClassAccuracyEvaluator, is_class_conditional
from vqf.evaluation.reconstruction import PRIOR_METRIC_DIRECTIONS
from vqf.evaluation.validation import ValidationResult
from vqf.images import to_rgb
from vqf.models.completion import can_complete, complete_tokens
from vqf.models.generator import Generator
from vqf.registry import build
from vqf.training.optimizer_step import OptimizerStep, ScalarAccumulator

PREVIEW_SAMPLES = 32  # samples drawn at every look
PREVIEW_COMPLETIONS = 9  # held-out images completed at every look
COMPLETIONS_CAPTION = (
    "Held-out images as their codes draw them: whole, the part that the prior is shown, and its answer."
)


class PriorTask:
    """One player: the prior, on cached tokens."""

    kind = "stage2"

    def __init__(
        self,
        generator: Generator,
        validation_tokens: TokenDataset,
        metadata: Mapping[str, Any],
        config: DictConfig,
        engine: Engine,
        class_evaluator: ClassAccuracyEvaluator | None = None,
    ) -> None:
        self.generator, self.validation_tokens, self.config, self.engine = generator, validation_tokens, config, engine
        assert isinstance(generator.prior, nn.Module)
        self.model = generator.prior
        self.parallel_loss = engine.parallelize(
            self.model, "loss", compiled=config.compile
        )  # before the optimizer is built
        self.modules: dict[str, nn.Module] = {"model": self.model, "tokenizer": generator.tokenizer}
        if generator.conditioner.state_dict():
            self.modules["conditioner"] = generator.conditioner
        optimizer = build("optimizer", config.optimizer, params=param_groups_weight_decay(self.model))
        self.optimizer_steps = {"model": OptimizerStep(optimizer, [self.model], config)}
        self.optimizers: dict[str, Optimizer] = {"model": optimizer}
        self.higher_is_better = PRIOR_METRIC_DIRECTIONS
        self.metadata, self.class_evaluator = metadata, class_evaluator

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Move the prior once; returns what to log."""
        total = ScalarAccumulator()
        self.generator.train()
        self.generator.tokenizer.eval()
        self.optimizer_steps["model"].start()
        pieces = batch.chunk(self.config.accumulate)
        for i, piece in enumerate(pieces, 1):
            with self.engine.accumulating(self.parallel_loss, more=i < len(pieces)):
                loss = self._loss(piece)
                (loss / len(pieces)).backward()
            total.add({"loss": loss}, 1 / len(pieces))
        total.add({"grad_norm": self.optimizer_steps["model"].step(total.values)})
        return total.values

    def evaluate(self, model: nn.Module) -> ValidationResult:
        """Return nats per token on held-out images, and samples."""
        generator = self._generator_with(model)
        loss = self._validation_loss(generator)
        scalars = {"nats_per_token": loss, "uniform_nats": math.log(generator.tokenizer.vocab_size)}
        with self.engine.autocast():
            return ValidationResult(
                scalars,
                self._preview_samples(generator) | self._preview_completions(generator),
                self._captions(generator),
            )

    def final_validation(self, model: nn.Module) -> ValidationResult:
        """Return how often samples are of the class that was asked for, where classes are asked for."""
        verdict = None if self.class_evaluator is None else self.class_evaluator(self._generator_with(model))
        if verdict is None:
            return ValidationResult({})
        seen = {"names": self.generator.classes, "confusion": verdict.confusion.tolist()}
        return ValidationResult(verdict.scalars(), details={"classes": seen})

    def _generator_with(self, model: nn.Module) -> Generator:
        parts = self.generator
        like = (parts.tokenizer, parts.conditioner, model, parts.sampler, parts.classes)
        return Generator(*like, crop_extent=parts.crop_extent).eval()  # type: ignore[arg-type]

    def _preview_samples(self, generator: Generator) -> dict[str, Tensor]:
        """Draw images by held-out conditions: each beside what it was told, where that can be seen."""
        told, shown = self._validation_batch(), generator.conditioner.render
        count = len(told) if told.condition_indices else PREVIEW_SAMPLES
        mine = indices_for_rank(count)  # of several processes each draws some
        which = {"seed": self.config.seed, "first": comm.rank() * len(mine)}
        if told.condition_indices:
            drawn = generator.tokenizer.decode_tokens(
                generator.sample_tokens(told.map(lambda each: each[mine]), **which)
            )
        else:
            drawn = generator.sample(len(mine), **which)
        samples = comm.gather_rows(drawn.float(), count)
        if samples is None or not told.condition_indices:
            return {} if samples is None else {"samples": samples}
        rows = [to_rgb(each) for each in shown(told).values()] + [samples]
        return {"samples": samples, "conditions": rearrange(rows, "rows b c h w -> (b rows) c h w")}

    def _preview_completions(self, generator: Generator) -> dict[str, Tensor]:
        """Complete held-out images from their upper half, where the sampler keeps codes."""
        if not can_complete(generator):
            return {}
        told = self._validation_batch(PREVIEW_COMPLETIONS)
        mine = indices_for_rank(len(told))
        some = told.map(lambda each: each[mine])
        rows = comm.gather_rows(complete_tokens(generator, some, seed=self.config.seed, first=mine[0]), len(told))
        return {} if rows is None else {"completions": rearrange(rows, "b three c h w -> (b three) c h w")}

    def _captions(self, generator: Generator) -> dict[str, Any]:
        """Return what is written over and under the images: the classes, where the prior is told them."""
        told, names = self._validation_batch(), generator.classes
        if not is_class_conditional(generator, told):
            return {"completions": {"caption": COMPLETIONS_CAPTION}}
        held_out = self._validation_batch(PREVIEW_COMPLETIONS).labels
        samples = told.labels if told.condition_indices else torch.arange(PREVIEW_SAMPLES) % len(names)
        assert samples is not None and held_out is not None
        return {
            "samples": {"labels": [names[each] for each in samples.tolist()]},
            "completions": {"caption": COMPLETIONS_CAPTION, "captions": [names[each] for each in held_out.tolist()]},
        }

    def _validation_batch(self, max_count: int = PREVIEW_SAMPLES) -> Batch:
        count = min(max_count, len(self.validation_tokens))
        spread = [i * len(self.validation_tokens) // count for i in range(count)]
        return self.validation_tokens.gather([0] * count, spread).to(self.engine.device)

    def _loss(self, batch: Batch) -> Tensor:
        assert batch.tokens is not None
        prefix = self.generator.conditioner(batch)
        with self.engine.autocast():
            return self.parallel_loss(batch.tokens, prefix)

    def _validation_loss(self, generator: Generator) -> float:
        count, size = len(self.validation_tokens), self.config.batch_size
        total = torch.zeros((), device=self.engine.device)
        for i in range(0, count, size):
            indices = list(range(i, min(i + size, count)))[comm.rank() :: comm.world_size()]
            if not indices:
                continue
            batch = self.validation_tokens.gather([0] * len(indices), indices).to(self.engine.device)
            assert batch.tokens is not None
            with self.engine.autocast():
                loss = generator.prior.loss(batch.tokens, generator.conditioner(batch))
            total += loss.float() * len(indices)
        return float(comm.all_reduce_sum(total)) / count


def param_groups_weight_decay(module: nn.Module) -> list[dict[str, Any]]:
    """Split parameters into those that weight decay may shrink, weights of linear layers, and all others.

    As minGPT and taming-transformers do: never biases, norms, embeddings and positions.
    """
    linear = {id(each.weight) for each in module.modules() if isinstance(each, nn.Linear)}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    shrinks = [parameter for parameter in trained if id(parameter) in linear]
    others = [parameter for parameter in trained if id(parameter) not in linear]
    groups: list[dict[str, Any]] = [{"params": shrinks}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
