"""What one step of each stage needs, found by doing it on tensors without content."""

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
from vqf.protocols import Autoregressive
from vqf.training.ema import EMA

SHARDED_KINDS = ("weights", "gradients", "optimizer", "average")
LOG_STEP_MULTIPLE = 10080  # a step that any `every` divides: what is done now and then is done there


@dataclass(frozen=True)
class Estimate:
    """What a stage needs.

    Attributes:
        parameters: Numbers of parameters, by part.
        trainable: How many of them learn.
        tokens_per_image: Of one image.
        peaks: By engine, the bytes of one process at the worst moment of a step, by what holds them.
        flops: Operations of one process in one step.
    """

    name: str
    parameters: Mapping[str, int]
    trainable: int
    tokens_per_image: int
    peaks: Mapping[str, Bytes]
    flops: int

    def peak(self, engine: str) -> int:
        """Return the bytes of one process at its worst moment."""
        return round(sum(self.peaks[engine].values()))


@dataclass(frozen=True)
class PlannedTask:
    """A stage and what it is fed."""

    task: Any
    make_batch: Callable[[], Batch]
    frozen: Mapping[str, nn.Module]  # what the stage holds beside its modules
    tokenizer: Tokenizer

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Return everything that keeps tensors."""
        return {**self.task.modules, **self.frozen}


def build_task(name: str, config: DictConfig, engine: Engine, classes: int) -> PlannedTask:
    """Build "stage1" or "stage2" of a config, without data."""
    if name == "stage1":
        first = tokenizer_task(config, engine, classes)
        frozen = {f"loss {key}": loss for key, loss in first.losses.items() if isinstance(loss, nn.Module)}
        return PlannedTask(
            first, lambda: image_batch(config.batch_size, image_size(config), engine.device), frozen, first.model
        )
    second = prior_task(config, engine, classes)
    return PlannedTask(
        second, lambda: token_batch(second, config.batch_size, engine.device), {}, second.generator.tokenizer
    )


def stage_config(config: DictConfig, name: str, world: int) -> DictConfig:
    """Return the config of one process of a stage, as pipeline=full would give it."""
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
    second = config.model.get("prior") is not None and group_nodes(config.model, "conditioner")
    return ["stage1", "stage2"] if second else ["stage1"]


def estimate(name: str, config: DictConfig, device: torch.device, world: int = 1, classes: int = 1000) -> Estimate:
    """Take two steps of a stage on tensors without content, and count.

    Args:
        name: "stage1" or "stage2".
        config: Of the whole run.
        device: On which it would run; it need not be there.
        world: Processes.
        classes: Labels that a conditioner knows.
    """
    config = stage_config(config, name, world)
    views: dict[str, Bytes] = {"single": {}}
    if world > 1:
        views = {"ddp": {"gradients": 0}, "fsdp2": dict.fromkeys(SHARDED_KINDS, 1 / world)}
    mode = FakeTensorMode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job, ledger = _build_fake_task(name, config, mode, classes), MemoryTracker(views)
        with mode, emulate_device(device, job.task.optimizers), ledger:
            average = _track_modules(ledger, job, config)  # noqa: F841  (it is there, like the rest)
            flops = _run_steps(ledger, job, config)
    every = [each for module in job.task.modules.values() for each in module.parameters()]
    trained = sum(each.numel() for each in every if each.requires_grad)
    height, width = job.tokenizer.grid
    peaks = {view: {**peak, **_communication_bytes(view, job)} for view, peak in ledger.peaks.items()}
    return Estimate(name, _count_parameters(job), trained, height * width, peaks, flops)


def estimate_sampling(config: DictConfig, device: torch.device, classes: int = 1000) -> Bytes | None:
    """Return the bytes of drawing `batch_size` images at once, by what holds them; None for priors without a cache.

    Weights and cache are what pipeline=sample keeps; it computes in float32.
    """
    mode = FakeTensorMode()
    config = stage_config(config, "stage2", 1)
    job, ledger = _build_fake_task("stage2", config, mode, classes), MemoryTracker({"single": {}})
    prior, conditioner = job.task.generator.prior.eval(), job.task.generator.conditioner
    if not isinstance(prior, Autoregressive):
        return None
    with mode, emulate_device(device, {}), ledger, torch.no_grad():
        ledger.track(module_tensors(job.task.generator), "weights")
        prefix = conditioner(job.make_batch())
        before = ledger.live_bytes["activations"]
        logits, cache = prior.prefill(prefix)
        del logits
        held = ledger.live_bytes["activations"] - before
        prior.decode(torch.zeros(len(prefix), dtype=torch.long), cache)
    return {**ledger.peaks["single"], "activations": ledger.peaks["single"]["activations"] - held, "cache": held}


def _build_fake_task(name: str, config: DictConfig, mode: FakeTensorMode, classes: int) -> PlannedTask:
    engine = FakeEngine(torch.device("cpu"), PRECISIONS[config.precision], mode=mode)
    with torch.device("meta"):
        return build_task(name, config, engine, classes)


def _communication_bytes(engine: str, task: PlannedTask) -> Bytes:
    """Return what a process holds all the time to work with others, by kind.

    DistributedDataParallel sends gradients from where they lie, and keeps that place between steps. fully_shard has
    what is in no block whole, with its gradients, and beside it a block, its gradients, what they are sent from, and
    the next block.
    """
    if engine == "single":
        return {}
    model = task.task.model
    if engine == "ddp":
        return {"gradients": _trainable_bytes(model)}
    parts = sorted((_trainable_bytes(each) for each in blocks(model)), reverse=True)
    rest = _trainable_bytes(model) - sum(parts)
    return {"borrowed": 2 * rest + max(4 * sum(parts[:1]), rest)}


def _trainable_bytes(module: nn.Module) -> int:
    return sum(each.nbytes for each in module.parameters() if each.requires_grad)


def _run_steps(tracker: MemoryTracker, planned: PlannedTask, config: DictConfig) -> int:
    """Take a usual step, which leaves the optimizers' state behind, then the worst; return what the first computed."""
    worst = (config.steps // LOG_STEP_MULTIPLE + 1) * LOG_STEP_MULTIPLE
    with ExitStack() as attended:
        for name, optimizer in planned.task.optimizers.items():
            kinds = ("gradients", "optimizer") if name == "model" else (name, name)
            attended.enter_context(
                tracker.tracking_optimizer(planned.task.modules[name].parameters(), optimizer, *kinds)
            )
        planned.task.step(worst + 1, planned.make_batch())
        flops = tracker.flops
        planned.task.step(worst, planned.make_batch())
    return flops


def _track_modules(tracker: MemoryTracker, planned: PlannedTask, config: DictConfig) -> EMA | None:
    for name, module in planned.modules.items():
        kind = {"model": "weights", "discriminator": "discriminator"}.get(name, "frozen networks")
        tracker.track(module_tensors(module), kind)
    if config.ema is not None:
        average = EMA(planned.task.model, config.ema)
        tracker.track(average.shadow_params.values(), "average")
        return average
    return None


def module_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield everything that a module keeps."""
    return chain(module.parameters(), module.buffers())


def _count_parameters(planned: PlannedTask) -> dict[str, int]:
    parts = {**dict(planned.task.model.named_children()), **{k: v for k, v in planned.modules.items() if k != "model"}}
    counts = {name: sum(each.numel() for each in part.parameters()) for name, part in parts.items()}
    return {name: count for name, count in counts.items() if count}
