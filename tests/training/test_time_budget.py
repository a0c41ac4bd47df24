"""minutes= becomes steps: how many, that nothing else changes, and that a resumed run keeps them."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.composing import compose
from tests.training.test_trainer import TINY, KilledError, interrupt_after, lines, weights
from vqf.batch import Batch
from vqf.distributed.engine import make_engine
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.protocols import to_steps
from vqf.runs.checkpoint import latest_checkpoint
from vqf.training import time_budget
from vqf.training.time_budget import count_steps, resolve_steps


@given(st.floats(0.5, 200), st.floats(0.1, 9), st.floats(1, 4), st.one_of(st.floats(0, 0.99), st.integers(1, 300)))
def test_steps_fill_the_time_and_no_more(seconds: float, early: float, dearer: float, start: float) -> None:
    late = early * dearer

    def spent(steps: int) -> float:
        begins = to_steps(start, steps)
        return sum(early if step < begins else late for step in range(steps))

    steps = count_steps(seconds, early, late, lambda steps: to_steps(start, steps))
    assert steps == 1 or spent(steps) <= seconds * (1 + 1e-9)
    assert spent(steps + 1) > seconds * (1 - 1e-9)


class Clock:
    """A clock that a step advances by its cost; the first steps cost ten times as much."""

    def __init__(self, early: float, late: float, start: int) -> None:
        self.now, self.costs, self.start, self.steps = 0.0, (early, late), start, list[int]()

    def step(self, step: int, batch: Batch) -> None:
        self.now += self.costs[step >= self.start] * (10 if len(self.steps) < time_budget.WARMUP_STEPS else 1)
        self.steps.append(step)


def source(start: int, stop: int) -> Iterator[Batch]:
    return (Batch(labels=torch.tensor([step])) for step in range(start, stop))


@pytest.mark.parametrize(("gan_start", "expected"), [(None, 1200), (lambda steps: to_steps(0.5, steps), 800)])
def test_late_steps_are_measured_after_the_discriminator_starts(
    gan_start: Any, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose("minutes=2", "device=cpu")
    clock = Clock(0.1, 0.2, start=50_000)
    monkeypatch.setattr(time_budget, "_clock", lambda engine: clock.now)
    stage: Any = SimpleNamespace(step=clock.step)
    fixed = resolve_steps(config, tmp_path, make_engine(config), lambda: stage, source, gan_start)
    assert fixed.steps == expected
    assert config.steps == 100_000  # what was given is left as it was
    assert clock.now < 0.15 * 120  # measuring is a small part of the budget
    assert (max(clock.steps) >= 50_000) == (gan_start is not None)


def test_without_minutes_nothing_is_measured(tmp_path: Path) -> None:
    config = compose("steps=7")

    def fail() -> Any:
        raise AssertionError

    assert resolve_steps(config, tmp_path, make_engine(config), fail, source) is config


def test_the_measured_steps_give_the_same_run(tmp_path: Path) -> None:
    timed, counted = tmp_path / "timed", tmp_path / "counted"
    Stage1(compose(*TINY, "minutes=0.003"), timed).run()
    checkpoint = latest_checkpoint(timed)
    assert checkpoint is not None and checkpoint.step == checkpoint.config.steps > 1
    Stage1(compose(*TINY, f"steps={checkpoint.step}"), counted).run()
    assert lines(timed) == lines(counted)
    assert weights(timed) == weights(counted)


def test_a_resumed_run_keeps_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_budget, "_measure_steps", lambda *_: 6)
    with monkeypatch.context() as patch:
        interrupt_after(4, patch, "stage1")
        with pytest.raises(KilledError):
            Stage1(compose(*TINY, "minutes=1"), tmp_path).run()
    monkeypatch.setattr(time_budget, "_measure_steps", lambda *_: 9)  # another machine
    Stage1(compose(*TINY, "minutes=1", "resume=true"), tmp_path).run()
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == found.config.steps == 6


@pytest.mark.slow
def test_stage2_takes_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stage1(compose(*TINY, "steps=1"), tmp_path / "tokenizer").run()
    options = [*TINY, "pipeline=stage2", f"run={tmp_path / 'tokenizer'}", "evaluate.samples=0"]
    Stage2(compose(*options, "minutes=0.003"), tmp_path / "timed").run()
    found = latest_checkpoint(tmp_path / "timed")
    assert found is not None and found.step == found.config.steps > 1
    Stage2(compose(*options, f"steps={found.step}"), tmp_path / "counted").run()
    assert weights(tmp_path / "timed") == weights(tmp_path / "counted")
