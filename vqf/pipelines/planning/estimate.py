"""Estimates the cost of a training step on fake tensors."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vqf.batch import Batch
from vqf.config.access import group_nodes, image_size
from vqf.distributed.engine import PRECISIONS, Engine
from vqf.distributed.fsdp import blocks
from vqf.errors import UserError
from vqf.models.tokenizer import Tokenizer
from vqf.pipelines.planning.fake_tensors import (
    FakeEngine,
    emulate_device,
    image_batch,
    prior_task,
    token_batch,
    tokenizer_task,
)
from vqf.pipelines.planning.memory_tracker import Bytes, MemoryTracker
from vqf.protocols import Causal
from vqf.training.ema import EMA

SHARDED_KINDS = ("weights", "gradients", "optimizer", "ema")
LOG_STEP_MULTIPLE = 10080  # 2^5 * 3^2 * 5 * 7: divisible by any usual `every`, so a step with all periodic work


@dataclass(frozen=True)
class Estimate:
    """The cost of a stage.

    Attributes:
        peaks: For each engine, the bytes of one process by kind, at the peak of a step.
        flops: Floating-point operations of one process in one step.
    """

    name: str
    parameters: Mapping[str, int]
    trainable: int
    tokens_per_image: int
    peaks: Mapping[str, Bytes]
    flops: int

    def peak(self, engine: str) -> int:
        return round(sum(self.peaks[engine].values()))


@dataclass(frozen=True)
class PlannedTask:
    """A training task, and a function that makes its batches."""

    task: Any
    make_batch: Callable[[], Batch]
    frozen: Mapping[str, nn.Module]  # networks that the task keeps beside its modules
    tokenizer: Tokenizer

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {**self.task.modules, **self.frozen}


def build_task(name: str, config: DictConfig, engine: Engine, classes: int) -> PlannedTask:
    """Build "stage1" or "stage2" without data."""
    if name == "stage1":
        stage1 = tokenizer_task(config, engine, classes)
        frozen = {f"loss {key}": loss for key, loss in stage1.losses.items() if isinstance(loss, nn.Module)}
        return PlannedTask(
            stage1, lambda: image_batch(config.batch_size, image_size(config), engine.device), frozen, stage1.model
        )
    stage2 = prior_task(config, engine, classes)
    return PlannedTask(
        stage2, lambda: token_batch(stage2, config.batch_size, engine.device), {}, stage2.generator.tokenizer
    )


def stage_config(config: DictConfig, name: str, world: int) -> DictConfig:
    """Return the config of a stage, with the batch size of one process.

    Raises:
        UserError: If the batch is not divisible.
    """
    config = config.copy()
    with open_dict(config):
        if name == "stage2":
            for key, value in config.stage2.items():
                config[key] = value
        if config.batch_size % (world * config.accumulate):
            raise UserError(
                f"batch_size={config.batch_size} cannot be divided among {world} processes "
                f"and accumulate={config.accumulate} micro-batches"
            )
        config.batch_size //= world
        config.compile = False
    return config


def trainable_stages(config: DictConfig) -> list[str]:
    """List the stages that a config can train."""
    has_prior = config.model.get("prior") is not None and group_nodes(config.model, "conditioner")
    return ["stage1", "stage2"] if has_prior else ["stage1"]


def estimate(name: str, config: DictConfig, device: torch.device, world: int = 1, classes: int = 1000) -> Estimate:
    """Run two steps of a stage on fake tensors, and count.

    Args:
        device: To plan for; it need not exist.
    """
    config = stage_config(config, name, world)
    views: dict[str, Bytes] = {"single": {}}
    if world > 1:
        views = {"ddp": {"gradients": 0}, "fsdp2": dict.fromkeys(SHARDED_KINDS, 1 / world)}
    mode = FakeTensorMode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planned, tracker = _build_fake_task(name, config, mode, classes), MemoryTracker(views)
        with mode, emulate_device(device, planned.task.optimizers), tracker:
            ema = _track_modules(tracker, planned, config)  # noqa: F841  (keeps its tensors alive)
            flops = _run_steps(tracker, planned, config)
    params = [param for module in planned.task.modules.values() for param in module.parameters()]
    trainable = sum(param.numel() for param in params if param.requires_grad)
    tokens = planned.tokenizer.layout.length
    peaks = {view: {**peak, **_communication_bytes(view, planned)} for view, peak in tracker.peaks.items()}
    return Estimate(name, _count_parameters(planned), trainable, tokens, peaks, flops)


def estimate_sampling(config: DictConfig, device: torch.device, classes: int = 1000) -> Bytes | None:
    """Return the peak bytes, by kind, of sampling `batch_size` images in float32; None without a KV cache."""
    mode = FakeTensorMode()
    config = stage_config(config, "stage2", 1)
    planned, tracker = _build_fake_task("stage2", config, mode, classes), MemoryTracker({"single": {}})
    prior, conditioner = planned.task.generator.prior.eval(), planned.task.generator.conditioner
    if not isinstance(prior, Causal):
        return None
    with mode, emulate_device(device, {}), tracker, torch.no_grad():
        tracker.track(module_tensors(planned.task.generator), "weights")
        prefix = conditioner(planned.make_batch())
        before = tracker.live_bytes["activations"]
        logits, cache = prior.prefill(prefix)
        del logits
        cache_bytes = tracker.live_bytes["activations"] - before
        prior.decode(torch.zeros(len(prefix), prior.groups[0], dtype=torch.long), cache)
    peak = tracker.peaks["single"]
    return {**peak, "activations": peak["activations"] - cache_bytes, "cache": cache_bytes}


def _build_fake_task(name: str, config: DictConfig, mode: FakeTensorMode, classes: int) -> PlannedTask:
    engine = FakeEngine(torch.device("cpu"), PRECISIONS[config.precision], mode=mode)
    with torch.device("meta"):
        return build_task(name, config, engine, classes)


def _communication_bytes(engine: str, task: PlannedTask) -> Bytes:
    """Return the bytes that a process holds for communication, by kind.

    DistributedDataParallel keeps buckets. `fully_shard` holds unsharded tensors outside of blocks, and four times the
    largest block: parameters, gradients, reduce buffer, prefetched next block.
    """
    if engine == "single":
        return {}
    model = task.task.model
    if engine == "ddp":
        return {"gradients": _trainable_bytes(model)}
    block_bytes = [_trainable_bytes(block) for block in blocks(model)]
    rest = _trainable_bytes(model) - sum(block_bytes)
    return {"communication": 2 * rest + max(4 * max(block_bytes, default=0), rest)}


def _trainable_bytes(module: nn.Module) -> int:
    return sum(param.nbytes for param in module.parameters() if param.requires_grad)


def _run_steps(tracker: MemoryTracker, planned: PlannedTask, config: DictConfig) -> int:
    """Run a usual step, and one with all periodic work; returns the first's FLOPs."""
    worst = (config.steps // LOG_STEP_MULTIPLE + 1) * LOG_STEP_MULTIPLE
    with ExitStack() as stack:
        for name, optimizer in planned.task.optimizers.items():
            kinds = ("gradients", "optimizer") if name == "model" else (name, name)
            params = planned.task.modules[name].parameters()
            stack.enter_context(tracker.tracking_optimizer(params, optimizer, *kinds))
        planned.task.step(worst + 1, planned.make_batch())
        flops = tracker.flops
        planned.task.step(worst, planned.make_batch())
    return flops


def _track_modules(tracker: MemoryTracker, planned: PlannedTask, config: DictConfig) -> EMA | None:
    for name, module in planned.modules.items():
        kind = {"model": "weights", "discriminator": "discriminator"}.get(name, "frozen networks")
        tracker.track(module_tensors(module), kind)
    if config.ema is not None:
        ema = EMA(planned.task.model, config.ema)
        tracker.track(ema.shadow_params.values(), "ema")
        return ema
    return None


def module_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers."""
    return chain(module.parameters(), module.buffers())


def _count_parameters(planned: PlannedTask) -> dict[str, int]:
    others = {name: module for name, module in planned.modules.items() if name != "model"}
    modules = {**dict(planned.task.model.named_children()), **others}
    counts = {name: sum(param.numel() for param in module.parameters()) for name, module in modules.items()}
    return {name: count for name, count in counts.items() if count}
