"""Measures time and peak memory of real training steps."""

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
from vqf.distributed.threads import cpu_threads
from vqf.pipelines.planning.estimate import LOG_STEP_MULTIPLE, build_task, module_tensors, stage_config
from vqf.training.ema import EMA

TIMED_STEPS = 3


@dataclass(frozen=True)
class StepBenchmark:
    """Measured cost of a step."""

    peak: int  # bytes
    seconds: float


def benchmark_step(name: str, config: DictConfig, engine: Engine, classes: int) -> StepBenchmark:
    """Measure steps of a stage on noise, with untrained weights.

    Raises:
        UserError: If the weights of a frozen network are not available.
    """
    cpu_threads.choose_once()
    config = stage_config(config, name, 1)
    planned = build_task(name, config, engine, classes)
    ema = None if config.ema is None else EMA(planned.task.model, config.ema)
    first = (config.steps // LOG_STEP_MULTIPLE + 1) * LOG_STEP_MULTIPLE

    def step(number: int) -> None:
        planned.task.step(number, planned.make_batch())
        if ema is not None:
            ema.update(number)

    step(first + 1)  # allocates the state of the optimizers
    held = sum(tensor.nbytes for module in planned.modules.values() for tensor in module_tensors(module))
    held += sum(param.nbytes for param in ema.shadow_params.values()) if ema else 0
    held += sum(_state_bytes(optimizer) for optimizer in planned.task.optimizers.values())
    peak = _peak_bytes(lambda: step(first), engine.device, held)
    return StepBenchmark(peak, _seconds_per_step(lambda i: step(first + 2 + i), engine.device))


def _state_bytes(optimizer: Optimizer) -> int:
    states: list[dict[str, Any]] = list(optimizer.state.values())
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))


def _peak_bytes(work: Callable[[], None], device: torch.device, held_bytes: int) -> int:
    """Measure the peak of some work; on CPU, sum the profiler's changes to what is held."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return held_bytes + max(accumulate(changes, initial=0))


def _seconds_per_step(step: Callable[[int], None], device: torch.device) -> float:
    start = time.monotonic()
    for i in range(TIMED_STEPS):
        step(i)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.monotonic() - start) / TIMED_STEPS
