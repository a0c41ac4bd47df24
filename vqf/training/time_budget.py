"""A budget of time in place of a number of steps, so that choices are charged for what they cost.

What a step costs is measured before the run, and buys its steps: `minutes=1` becomes `steps=1463`. From there on it
is an ordinary run, with its schedule, its checkpoints, and the same result for the same steps on any machine. A clock
that stopped it would make every run another one.
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

MEASURE_FRACTION = 0.04  # of the budget that measuring one kind of step may take
WARMUP_STEPS = 3  # steps that are not measured: allocators and compilers are slower then
MIN_STEPS = 5  # steps that are
TAIL_STEPS = 1000  # steps at the end of a run, where everything that begins later has begun


def resolve_steps(
    config: DictConfig,
    run_dir: Path,
    engine: Engine,
    make_task: Callable[[], TrainingTask],
    source: BatchSource,
    gan_start: Callable[[int], int] | None = None,
) -> DictConfig:
    """Return a config whose `steps` fill its `minutes`; the same config, where it has none.

    A run that goes on keeps the steps that it began with.

    Args:
        config: `minutes` are those of training steps on a machine that does nothing else. Held-out looks and
            checkpoints come on top.
        run_dir: Where a run that goes on has its checkpoints.
        engine: Where the steps run.
        make_task: Builds a stage that is tried and thrown away.
        source: Yields batches from one step up to another.
        gan_start: Given the steps of a run, the first that costs more than those before, as when a discriminator joins.
    """
    if config.minutes is None:
        return config
    known = find_resume_checkpoint(config.resume, run_dir)
    steps = known.config.steps if known is not None else _measure_steps(config, engine, make_task(), source, gan_start)
    config = config.copy()
    with open_dict(config):
        config.steps = steps
    return config


def count_steps(seconds: float, early: float, late: float, gan_start: Callable[[int], int]) -> int:
    """Return the most steps that fit into a time, at least 1.

    Args:
        seconds: The time.
        early: Seconds of a step.
        late: Seconds of a step from the one that `gan_start` names on.
        gan_start: Given the steps of a run.
    """

    def fits(steps: int) -> bool:
        before = min(max(gan_start(steps), 0), steps)
        return early * before + late * (steps - before) <= seconds

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
    early = late = _step_seconds(task, engine, source, 0, MEASURE_FRACTION * seconds)
    if gan_start is not None:
        late = _step_seconds(
            task, engine, source, max(gan_start(config.steps), config.steps - TAIL_STEPS), MEASURE_FRACTION * seconds
        )
    early, late = comm.broadcast_object((early, late))
    steps = count_steps(seconds, early, late, gan_start or (lambda steps: steps))
    costs = f"{early:.3g} s" if gan_start is None else f"{early:.3g} s, later {late:.3g} s"
    log.info("minutes=%g: a step takes %s, so steps=%d, which gives the same run", config.minutes, costs, steps)
    return steps


def _step_seconds(task: TrainingTask, engine: Engine, source: BatchSource, first: int, seconds: float) -> float:
    """Return the seconds of a step, its batch included, from those that fit into some seconds from a first one on."""
    with closing(source(first, first + 10**6)) as batches:  # type: ignore[type-var]
        steps = enumerate(batches, first)
        _time_steps(task, engine, steps, WARMUP_STEPS)
        cost = _time_steps(task, engine, steps, MIN_STEPS) / MIN_STEPS
        count = comm.broadcast_object(max(round(seconds / cost), 1))
        return _time_steps(task, engine, steps, count) / count


def _time_steps(task: TrainingTask, engine: Engine, steps: Iterator[tuple[int, Batch]], count: int) -> float:
    """Take some steps and return the seconds of all of them."""
    began = _clock(engine)
    for step, batch in islice(steps, count):
        task.step(step, batch.to(engine.device))
    return _clock(engine) - began


def _clock(engine: Engine) -> float:
    """Read a clock that does not count what other programs do meanwhile, where there is one.

    On the CPU it is the time of this process on its cores, per core that it uses. An accelerator has no such clock.
    """
    if engine.device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.accelerator.synchronize(engine.device)
    return time.monotonic()
