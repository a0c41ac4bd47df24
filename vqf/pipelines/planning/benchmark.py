"""What a few real steps need on this machine, by the device's own count of its memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from omegaconf import DictConfig
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from vqf.distributed.engine import Engine
from vqf.pipelines.planning.estimate import EVERY, build_job, stage_config, tensors
from vqf.training.ema import Average

STEPS = 3  # that are timed


@dataclass(frozen=True)
class Measured:
    """What a real step took."""

    peak: int  # bytes
    seconds: float


def measure(name: str, config: DictConfig, engine: Engine, classes: int) -> Measured:
    """Take real steps of a stage, on pictures of noise and weights that were never trained.

    Raises:
        UserError: If weights of a frozen network cannot be had.
    """
    config = stage_config(config, name, 1)
    job = build_job(name, config, engine, classes)
    average = None if config.ema is None else Average(job.stage.model, config.ema)
    first = (config.steps // EVERY + 1) * EVERY

    def step(number: int) -> None:
        job.stage.step(number, job.batch())
        if average is not None:
            average.update(number)

    step(first + 1)  # allocates the optimizers' state
    held = sum(each.nbytes for module in job.modules.values() for each in tensors(module))
    held += sum(each.nbytes for each in average.tensors.values()) if average else 0
    held += sum(_state_bytes(optimizer) for optimizer in job.stage.optimizers.values())
    peak = _peak(lambda: step(first), engine.device, held)
    return Measured(peak, _seconds(lambda i: step(first + 2 + i), engine.device))


def _state_bytes(optimizer: Optimizer) -> int:
    states: list[dict[str, Any]] = list(optimizer.state.values())
    return sum(each.nbytes for state in states for each in state.values() if isinstance(each, torch.Tensor))


def _peak(work: Callable[[], None], device: torch.device, held: int) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    changes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    return held + max(accumulate(changes, initial=0))


def _seconds(step: Callable[[int], None], device: torch.device) -> float:
    """Return the mean time of a step."""
    began = time.monotonic()
    for i in range(STEPS):
        step(i)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.monotonic() - began) / STEPS
