"""Training for a time: `minutes=1` becomes, for instance, `steps=1463`.

Steps are measured before the run, so that it can be repeated.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from omegaconf import DictConfig, open_dict

from vqf.batch import Batch
from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.distributed.threads import cpu_threads
from vqf.runs.resume import find_resume_checkpoint
from vqf.terminal import log
from vqf.training.task import BatchSource, TrainingTask

MEASURE_FRACTION = 0.04  # of the time, for each of the two measurements
WARMUP_STEPS = 3  # not measured: allocators and compilers make the first steps slower
MIN_STEPS = 5  # measured first, to know how many more fit into the measurement
TAIL_STEPS = 1000  # the late measurement starts so many steps before the end, where the discriminator trains


def resolve_steps(
    config: DictConfig,
    run_dir: Path,
    engine: Engine,
    make_task: Callable[[], TrainingTask],
    source: BatchSource,
    gan_start: Callable[[int], int] | None = None,
) -> DictConfig:
    """Return a config whose `steps` take `minutes`, if given; a resumed run keeps its steps.

    Args:
        config: `minutes` counts no validations and checkpoints.
        make_task: Builds a task to measure and throw away.
        gan_start: From the steps of a run to the first that takes longer.
    """
    if config.minutes is None:
        return config
    resumed = find_resume_checkpoint(config.resume, run_dir)
    if resumed is not None:
        steps = resumed.config.steps
    else:
        steps = _measure_steps(config, engine, make_task(), source, gan_start)
    config = config.copy()
    with open_dict(config):
        config.steps = steps
    return config


def count_steps(seconds: float, early: float, late: float, gan_start: Callable[[int], int]) -> int:
    """Return the largest number of steps that fit into `seconds`, at least 1.

    Args:
        early: Seconds per step before `gan_start`.
        late: Seconds per step from `gan_start` on.
    """

    def fits(steps: int) -> bool:
        before = min(max(gan_start(steps), 0), steps)
        return early * before + late * (steps - before) <= seconds

    # Double until it does not fit, then bisect: `gan_start` may be any function, so there is no formula.
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _measure_steps(
    config: DictConfig, engine: Engine, task: TrainingTask, source: BatchSource, gan_start: Callable[[int], int] | None
) -> int:
    seconds = 60 * config.minutes
    limit = MEASURE_FRACTION * seconds
    cpu_threads.choose_once()
    early = late = _step_seconds(task, engine, source, 0, limit)
    if gan_start is not None:
        late = _step_seconds(task, engine, source, max(gan_start(config.steps), config.steps - TAIL_STEPS), limit)
    early, late = comm.broadcast_object((early, late))  # all ranks must take the same number of steps
    steps = count_steps(seconds, early, late, gan_start or (lambda steps: steps))
    costs = f"{early:.3g} s" if gan_start is None else f"{early:.3g} s, later {late:.3g} s"
    log.info("minutes=%g: a step takes %s, so steps=%d, which gives the same run", config.minutes, costs, steps)
    return steps


def _step_seconds(task: TrainingTask, engine: Engine, source: BatchSource, first: int, limit: float) -> float:
    with closing(source(first, first + 10**6)) as batches:
        steps = enumerate(batches, first)
        _time_steps(task, engine, steps, WARMUP_STEPS)
        estimate = _time_steps(task, engine, steps, MIN_STEPS) / MIN_STEPS
        count = comm.broadcast_object(max(round(limit / estimate), 1))
        return _time_steps(task, engine, steps, count) / count


def _time_steps(task: TrainingTask, engine: Engine, steps: Iterator[tuple[int, Batch]], count: int) -> float:
    start = _clock(engine)
    for step, batch in islice(steps, count):
        task.step(step, batch.to(engine.device))
    return _clock(engine) - start


def _clock(engine: Engine) -> float:
    """Return CPU seconds per used core, or wall-clock seconds on an accelerator."""
    if engine.device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.accelerator.synchronize(engine.device)
    return time.monotonic()
