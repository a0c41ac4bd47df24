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
from vqf.runs.resume import find_resume
from vqf.terminal import log
from vqf.training.trainer import Stage

SHARE = 0.04  # of the budget that measuring one kind of step may take
WARM_UP = 3  # steps that are not measured: allocators and compilers are slower then
LEAST = 5  # steps that are
LAST = 1000  # steps at the end of a run, where everything that begins later has begun

Source = Callable[[int, int], Iterator[Batch]]


def fix_steps(
    config: DictConfig,
    run_dir: Path,
    engine: Engine,
    make: Callable[[], Stage],
    source: Source,
    late_from: Callable[[int], int] | None = None,
) -> DictConfig:
    """Return a config whose `steps` fill its `minutes`; the same config, where it has none.

    A run that goes on keeps the steps that it began with.

    Args:
        config: `minutes` are those of training steps on a machine that does nothing else. Held-out looks and
            checkpoints come on top.
        run_dir: Where a run that goes on has its checkpoints.
        engine: Where the steps run.
        make: Builds a stage that is tried and thrown away.
        source: Yields batches from one step up to another.
        late_from: Given the steps of a run, the first that costs more than those before, as when a discriminator joins.
    """
    if config.minutes is None:
        return config
    known = find_resume(config.resume, run_dir)
    steps = known.config.steps if known is not None else _measure(config, engine, make(), source, late_from)
    config = config.copy()
    with open_dict(config):
        config.steps = steps
    return config


def count_steps(seconds: float, early: float, late: float, late_from: Callable[[int], int]) -> int:
    """Return the most steps that fit into a time, at least 1.

    Args:
        seconds: The time.
        early: Seconds of a step.
        late: Seconds of a step from the one that `late_from` names on.
        late_from: Given the steps of a run.
    """

    def fits(steps: int) -> bool:
        before = min(max(late_from(steps), 0), steps)
        return early * before + late * (steps - before) <= seconds

    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _measure(
    config: DictConfig, engine: Engine, stage: Stage, source: Source, late_from: Callable[[int], int] | None
) -> int:
    seconds = 60 * config.minutes
    early = late = _cost(stage, engine, source, 0, SHARE * seconds)
    if late_from is not None:
        late = _cost(stage, engine, source, max(late_from(config.steps), config.steps - LAST), SHARE * seconds)
    early, late = comm.same((early, late))
    steps = count_steps(seconds, early, late, late_from or (lambda steps: steps))
    costs = f"{early:.3g} s" if late_from is None else f"{early:.3g} s, later {late:.3g} s"
    log.info("minutes=%g: a step takes %s, so steps=%d, which gives the same run", config.minutes, costs, steps)
    return steps


def _cost(stage: Stage, engine: Engine, source: Source, first: int, seconds: float) -> float:
    """Return the seconds of a step, its batch included, from those that fit into some seconds from a first one on."""
    with closing(source(first, first + 10**6)) as batches:  # type: ignore[type-var]
        steps = enumerate(batches, first)
        _take(stage, engine, steps, WARM_UP)
        cost = _take(stage, engine, steps, LEAST) / LEAST
        count = comm.same(max(round(seconds / cost), 1))
        return _take(stage, engine, steps, count) / count


def _take(stage: Stage, engine: Engine, steps: Iterator[tuple[int, Batch]], count: int) -> float:
    """Take some steps and return the seconds of all of them."""
    began = _now(engine)
    for step, batch in islice(steps, count):
        stage.step(step, batch.to(engine.device))
    return _now(engine) - began


def _now(engine: Engine) -> float:
    """Read a clock that does not count what other programs do meanwhile, where there is one.

    On the CPU it is the time of this process on its cores, per core that it uses. An accelerator has no such clock.
    """
    if engine.device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.accelerator.synchronize(engine.device)
    return time.monotonic()
