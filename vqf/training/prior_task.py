"""Stage 2: train a prior on the tokens of a frozen tokenizer.

VQGAN, https://arxiv.org/abs/2012.09841, section 3.2: maximize the log-likelihood of an image's tokens in raster order,
after those of a condition.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

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
from vqf.evaluation.likelihood import prior_directions, prior_scalars
from vqf.evaluation.validation import ValidationResult
from vqf.models.completion import can_complete, complete_tokens
from vqf.models.generator import Generator
from vqf.protocols import Prior
from vqf.registry import build
from vqf.training.freezing import FrozenParts
from vqf.training.optimizer_step import OptimizerStep, ScalarAccumulator

PREVIEW_SAMPLES = 32  # images sampled at every validation
PREVIEW_COMPLETIONS = 9  # validation images completed at every validation
COMPLETIONS_CAPTION = (
    "Validation images decoded from their codes: complete, only the part that the prior is given, and completed by the "
    "prior."
)


class PriorTask:
    """Trains the prior of a generator on cached tokens."""

    kind = "stage2"

    def __init__(
        self,
        generator: Generator,
        validation_tokens: TokenDataset,
        metadata: Mapping[str, Any],
        config: DictConfig,
        engine: Engine,
        class_evaluator: ClassAccuracyEvaluator | None = None,
        freeze: Sequence[str] = (),
    ) -> None:
        self.generator, self.validation_tokens, self.config, self.engine = generator, validation_tokens, config, engine
        assert isinstance(generator.prior, nn.Module)
        self.model = generator.prior
        self.frozen = FrozenParts(generator.prior, freeze)
        # Before the optimizer is built: fsdp2 replaces the parameters.
        self.parallel_loss = engine.parallelize(self.model, "loss", compiled=config.compile)
        self.modules: dict[str, nn.Module] = {"model": self.model, "tokenizer": generator.tokenizer}
        if generator.conditioner.state_dict():
            self.modules["conditioner"] = generator.conditioner
        optimizer = build("optimizer", config.optimizer, params=param_groups_weight_decay(self.model))
        self.optimizer_steps = {"model": OptimizerStep(optimizer, [self.model], config)}
        self.optimizers: dict[str, Optimizer] = {"model": optimizer}
        self.higher_is_better = prior_directions(config)
        self.metadata, self.class_evaluator = metadata, class_evaluator

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        logs = ScalarAccumulator()
        self.generator.train()
        self.generator.tokenizer.eval()
        self.frozen.eval()
        self.optimizer_steps["model"].start()
        micro_batches = batch.chunk(self.config.accumulate)
        count = len(micro_batches)
        for i, micro_batch in enumerate(micro_batches, 1):
            with self.engine.accumulating(self.parallel_loss, more=i < count):
                loss = self._loss(micro_batch)
                (loss / count).backward()
            logs.add({"loss": loss}, 1 / count)
        logs.add({"grad_norm": self.optimizer_steps["model"].step(logs.values)})
        return logs.values

    def _loss(self, batch: Batch) -> Tensor:
        assert batch.tokens is not None
        prefix = self.generator.conditioner(batch)
        with self.engine.autocast():
            return self.parallel_loss(batch.tokens, prefix)

    def evaluate(self, model: nn.Module) -> ValidationResult:
        generator = self._generator_with(model)
        loss = self._validation_loss(generator)
        scalars = prior_scalars(generator.prior, loss)
        with self.engine.autocast():
            images = self._preview_samples(generator) | self._preview_completions(generator)
            return ValidationResult(scalars, images, self._captions(generator))

    def final_validation(self, model: nn.Module) -> ValidationResult:
        accuracy = None if self.class_evaluator is None else self.class_evaluator(self._generator_with(model))
        if accuracy is None:
            return ValidationResult({})
        classes = {"names": self.generator.classes, "confusion": accuracy.confusion.tolist()}
        return ValidationResult(accuracy.scalars(), details={"classes": classes})

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
            total += loss.float() * len(indices)  # ranks have different counts, so sum here and divide once
        return float(comm.all_reduce_sum(total)) / count

    def _preview_samples(self, generator: Generator) -> dict[str, Tensor]:
        conditions = self._validation_batch()
        has_conditions = bool(conditions.condition_indices)
        count = len(conditions) if has_conditions else PREVIEW_SAMPLES
        indices = indices_for_rank(count)  # each rank samples its own
        noise = {"seed": self.config.seed, "first": comm.rank() * len(indices)}
        if has_conditions:
            tokens = generator.sample_tokens(conditions.map(lambda field: field[indices]), **noise)
            images = generator.tokenizer.decode_tokens(tokens)
        else:
            images = generator.sample(len(indices), **noise)
        samples = comm.gather_rows(images.float(), count)
        if samples is None:
            return {}
        if not has_conditions:
            return {"samples": samples}
        rows = [*generator.conditioner.render(conditions).values(), samples]
        return {"samples": samples, "conditions": rearrange(rows, "rows b c h w -> (b rows) c h w")}

    def _preview_completions(self, generator: Generator) -> dict[str, Tensor]:
        if not can_complete(generator):
            return {}
        batch = self._validation_batch(PREVIEW_COMPLETIONS)
        indices = indices_for_rank(len(batch))
        own = batch.map(lambda field: field[indices])
        triples = complete_tokens(generator, own, seed=self.config.seed, first=indices[0])
        rows = comm.gather_rows(triples, len(batch))
        return {} if rows is None else {"completions": rearrange(rows, "b three c h w -> (b three) c h w")}

    def _captions(self, generator: Generator) -> dict[str, Any]:
        batch, names = self._validation_batch(), generator.classes
        if not is_class_conditional(generator, batch):
            return {"completions": {"caption": COMPLETIONS_CAPTION}}
        completion_labels = self._validation_batch(PREVIEW_COMPLETIONS).labels
        # Without other conditions `generator.sample` goes through the classes in turn.
        sample_labels = batch.labels if batch.condition_indices else torch.arange(PREVIEW_SAMPLES) % len(names)
        assert sample_labels is not None and completion_labels is not None
        captions = [names[label] for label in completion_labels.tolist()]
        return {
            "samples": {"labels": [names[label] for label in sample_labels.tolist()]},
            "completions": {"caption": COMPLETIONS_CAPTION, "captions": captions},
        }

    def _validation_batch(self, max_count: int = PREVIEW_SAMPLES) -> Batch:
        count = min(max_count, len(self.validation_tokens))
        indices = [i * len(self.validation_tokens) // count for i in range(count)]
        return self.validation_tokens.gather([0] * count, indices).to(self.engine.device)

    def _generator_with(self, model: nn.Module) -> Generator:
        own = self.generator
        generator = Generator(own.tokenizer, own.conditioner, cast(Prior, model), own.sampler, own.classes)
        generator.crop_extent = own.crop_extent
        return generator.eval()


def param_groups_weight_decay(module: nn.Module) -> list[dict[str, Any]]:
    """Split parameters into weights of linear layers, and all others without weight decay."""
    linear_weights = {id(submodule.weight) for submodule in module.modules() if isinstance(submodule, nn.Linear)}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if id(parameter) in linear_weights]
    others = [parameter for parameter in trained if id(parameter) not in linear_weights]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
