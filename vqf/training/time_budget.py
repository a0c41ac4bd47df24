"""Training for a time instead of a number of steps: `minutes=1` becomes, for instance, `steps=1463`.

The seconds of a step are measured before the run. From there on it is a run of so many steps, with its schedule, its
checkpoints, and the same result for the same steps on any machine. A run that a clock stopped could not be repeated.
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
    """Return a config whose `steps` take `minutes`; the same config if `minutes` is null.

    A resumed run keeps its steps.

    Args:
        config: `minutes` counts training steps only, on an otherwise idle machine. Validations and checkpoints come
            on top.
        run_dir: The run's folder.
        engine: Device, precision and parallelism.
        make_task: Builds a task to measure, which is thrown away afterwards.
        source: Yields the batches of a range of batch numbers.
        gan_start: From the steps of a run to the first step that takes longer, when the discriminator starts.
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
    """Return the largest number of steps that fit into a time, at least 1.

    Args:
        seconds: The time.
        early: Seconds per step before `gan_start`.
        late: Seconds per step from `gan_start` on.
        gan_start: From the steps of a run to the first late step.
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
    early = late = _step_seconds(task, engine, source, 0, limit)
    if gan_start is not None:
        late = _step_seconds(task, engine, source, max(gan_start(config.steps), config.steps - TAIL_STEPS), limit)
    early, late = comm.broadcast_object((early, late))  # all ranks must take the same number of steps
    steps = count_steps(seconds, early, late, gan_start or (lambda steps: steps))
    costs = f"{early:.3g} s" if gan_start is None else f"{early:.3g} s, later {late:.3g} s"
    log.info("minutes=%g: a step takes %s, so steps=%d, which gives the same run", config.minutes, costs, steps)
    return steps


def _step_seconds(task: TrainingTask, engine: Engine, source: BatchSource, first: int, limit: float) -> float:
    """Measure the seconds per step, loading included, from step `first` on; takes about `limit` seconds."""
    with closing(source(first, first + 10**6)) as batches:  # type: ignore[type-var]
        steps = enumerate(batches, first)
        _time_steps(task, engine, steps, WARMUP_STEPS)
        estimate = _time_steps(task, engine, steps, MIN_STEPS) / MIN_STEPS
        count = comm.broadcast_object(max(round(limit / estimate), 1))
        return _time_steps(task, engine, steps, count) / count


def _time_steps(task: TrainingTask, engine: Engine, steps: Iterator[tuple[int, Batch]], count: int) -> float:
    """Take steps and return their seconds."""
    start = _clock(engine)
    for step, batch in islice(steps, count):
        task.step(step, batch.to(engine.device))
    return _clock(engine) - start


def _clock(engine: Engine) -> float:
    """Return seconds of a clock that other programs do not advance, where there is one.

    On the CPU: processor time of this process per core that it uses. On an accelerator: wall-clock time.
    """
    if engine.device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.accelerator.synchronize(engine.device)
    return time.monotonic()
