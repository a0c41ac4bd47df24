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
from vqf.config.access import chosen, image_size
from vqf.distributed.engine import PRECISIONS, Engine
from vqf.distributed.fsdp import blocks
from vqf.errors import UserError
from vqf.models.tokenizer import Tokenizer
from vqf.pipelines.planning.fake_tensors import Pretender, as_on, codes, pictures, prior_stage, tokenizer_stage
from vqf.pipelines.planning.memory_tracker import Bytes, Ledger
from vqf.protocols import Autoregressive
from vqf.training.ema import Average

SHARDED = ("weights", "gradients", "optimizer", "average")
EVERY = 10080  # a step that any `every` divides: what is done now and then is done there


@dataclass(frozen=True)
class Estimate:
    """What a stage needs.

    Attributes:
        parameters: Numbers of parameters, by part.
        trained: How many of them learn.
        tokens: Of one picture.
        peaks: By engine, the bytes of one process at the worst moment of a step, by what holds them.
        flops: Operations of one process in one step.
    """

    stage: str
    parameters: Mapping[str, int]
    trained: int
    tokens: int
    peaks: Mapping[str, Bytes]
    flops: int

    def peak(self, engine: str) -> int:
        """Return the bytes of one process at its worst moment."""
        return round(sum(self.peaks[engine].values()))


@dataclass(frozen=True)
class Job:
    """A stage and what it is fed."""

    stage: Any
    batch: Callable[[], Batch]
    frozen: Mapping[str, nn.Module]  # what the stage holds beside its modules
    tokenizer: Tokenizer

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Return everything that keeps tensors."""
        return {**self.stage.modules, **self.frozen}


def build_job(name: str, config: DictConfig, engine: Engine, classes: int) -> Job:
    """Build "stage1" or "stage2" of a config, without data."""
    if name == "stage1":
        first = tokenizer_stage(config, engine, classes)
        frozen = {f"loss {key}": loss for key, loss in first.losses.items() if isinstance(loss, nn.Module)}
        return Job(first, lambda: pictures(config.batch_size, image_size(config), engine.device), frozen, first.model)
    second = prior_stage(config, engine, classes)
    return Job(second, lambda: codes(second, config.batch_size, engine.device), {}, second.generator.tokenizer)


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


def stages_of(config: DictConfig) -> list[str]:
    """List the stages that a config can train."""
    second = config.model.get("prior") is not None and chosen(config.model, "conditioner")
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
        views = {"ddp": {"gradients": 0}, "fsdp2": dict.fromkeys(SHARDED, 1 / world)}
    mode = FakeTensorMode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job, ledger = _pretend(name, config, mode, classes), Ledger(views)
        with mode, as_on(device, job.stage.optimizers), ledger:
            average = _enter(ledger, job, config)  # noqa: F841  (it is there, like the rest)
            flops = _steps(ledger, job, config)
    every = [each for module in job.stage.modules.values() for each in module.parameters()]
    trained = sum(each.numel() for each in every if each.requires_grad)
    height, width = job.tokenizer.grid
    peaks = {view: {**peak, **_shared(view, job)} for view, peak in ledger.peaks.items()}
    return Estimate(name, _parameters(job), trained, height * width, peaks, flops)


def estimate_drawing(config: DictConfig, device: torch.device, classes: int = 1000) -> Bytes | None:
    """Return the bytes of drawing `batch_size` pictures at once, by what holds them; None for priors without a cache.

    Weights and cache are what pipeline=sample keeps; it computes in float32.
    """
    mode = FakeTensorMode()
    config = stage_config(config, "stage2", 1)
    job, ledger = _pretend("stage2", config, mode, classes), Ledger({"single": {}})
    prior, conditioner = job.stage.generator.prior.eval(), job.stage.generator.conditioner
    if not isinstance(prior, Autoregressive):
        return None
    with mode, as_on(device, {}), ledger, torch.no_grad():
        ledger.enter(tensors(job.stage.generator), "weights")
        prefix = conditioner(job.batch())
        before = ledger.live["activations"]
        logits, cache = prior.begin(prefix)
        del logits
        held = ledger.live["activations"] - before
        prior.advance(torch.zeros(len(prefix), dtype=torch.long), cache)
    return {**ledger.peaks["single"], "activations": ledger.peaks["single"]["activations"] - held, "cache": held}


def _pretend(name: str, config: DictConfig, mode: FakeTensorMode, classes: int) -> Job:
    engine = Pretender(torch.device("cpu"), PRECISIONS[config.precision], mode=mode)
    with torch.device("meta"):
        return build_job(name, config, engine, classes)


def _shared(view: str, job: Job) -> Bytes:
    """Return what a process holds all the time to work with others, by kind.

    DistributedDataParallel sends gradients from where they lie, and keeps that place between steps. fully_shard has
    what is in no block whole, with its gradients, and beside it a block, its gradients, what they are sent from, and
    the next block.
    """
    if view == "single":
        return {}
    model = job.stage.model
    if view == "ddp":
        return {"gradients": _bytes(model)}
    parts = sorted((_bytes(each) for each in blocks(model)), reverse=True)
    rest = _bytes(model) - sum(parts)
    return {"borrowed": 2 * rest + max(4 * sum(parts[:1]), rest)}


def _bytes(module: nn.Module) -> int:
    return sum(each.nbytes for each in module.parameters() if each.requires_grad)


def _steps(ledger: Ledger, job: Job, config: DictConfig) -> int:
    """Take a usual step, which leaves the optimizers' state behind, then the worst; return what the first computed."""
    worst = (config.steps // EVERY + 1) * EVERY
    with ExitStack() as attended:
        for name, optimizer in job.stage.optimizers.items():
            kinds = ("gradients", "optimizer") if name == "model" else (name, name)
            attended.enter_context(ledger.attending(job.stage.modules[name].parameters(), optimizer, *kinds))
        job.stage.step(worst + 1, job.batch())
        flops = ledger.flops
        job.stage.step(worst, job.batch())
    return flops


def _enter(ledger: Ledger, job: Job, config: DictConfig) -> Average | None:
    for name, module in job.modules.items():
        kind = {"model": "weights", "discriminator": "discriminator"}.get(name, "frozen networks")
        ledger.enter(tensors(module), kind)
    if config.ema is not None:
        average = Average(job.stage.model, config.ema)
        ledger.enter(average.tensors.values(), "average")
        return average
    return None


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield everything that a module keeps."""
    return chain(module.parameters(), module.buffers())


def _parameters(job: Job) -> dict[str, int]:
    parts = {**dict(job.stage.model.named_children()), **{k: v for k, v in job.modules.items() if k != "model"}}
    counts = {name: sum(each.numel() for each in part.parameters()) for name, part in parts.items()}
    return {name: count for name, count in counts.items() if count}
