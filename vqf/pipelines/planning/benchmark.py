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
from vqf.pipelines.planning.estimate import LOG_STEP_MULTIPLE, build_task, module_tensors, stage_config
from vqf.training.ema import EMA

TIMED_STEPS = 3  # that are timed


@dataclass(frozen=True)
class StepBenchmark:
    """What a real step took."""

    peak: int  # bytes
    seconds: float


def benchmark_step(name: str, config: DictConfig, engine: Engine, classes: int) -> StepBenchmark:
    """Take real steps of a stage, on images of noise and weights that were never trained.

    Raises:
        UserError: If weights of a frozen network cannot be had.
    """
    config = stage_config(config, name, 1)
    job = build_task(name, config, engine, classes)
    average = None if config.ema is None else EMA(job.task.model, config.ema)
    first = (config.steps // LOG_STEP_MULTIPLE + 1) * LOG_STEP_MULTIPLE

    def step(number: int) -> None:
        job.task.step(number, job.make_batch())
        if average is not None:
            average.update(number)

    step(first + 1)  # allocates the optimizers' state
    held = sum(each.nbytes for module in job.modules.values() for each in module_tensors(module))
    held += sum(each.nbytes for each in average.shadow_params.values()) if average else 0
    held += sum(_state_bytes(optimizer) for optimizer in job.task.optimizers.values())
    peak = _peak_bytes(lambda: step(first), engine.device, held)
    return StepBenchmark(peak, _seconds_per_step(lambda i: step(first + 2 + i), engine.device))


def _state_bytes(optimizer: Optimizer) -> int:
    states: list[dict[str, Any]] = list(optimizer.state.values())
    return sum(each.nbytes for state in states for each in state.values() if isinstance(each, torch.Tensor))


def _peak_bytes(work: Callable[[], None], device: torch.device, held_bytes: int) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    changes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    return held_bytes + max(accumulate(changes, initial=0))


def _seconds_per_step(step: Callable[[int], None], device: torch.device) -> float:
    """Return the mean time of a step."""
    began = time.monotonic()
    for i in range(TIMED_STEPS):
        step(i)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.monotonic() - began) / TIMED_STEPS
