"""The number of threads: which one is chosen, when it is measured again, and that digits depend on nothing else."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.composing import compose
from tests.training.test_trainer import TINY, KilledError, interrupt_after, lines, weights
from vqf.distributed import comm, threads
from vqf.distributed.engine import make_engine
from vqf.distributed.threads import MEASURE_SECONDS, RETRY_SECONDS, WINDOW_SECONDS, ThreadTuner, cpu_threads
from vqf.pipelines.stage1 import Stage1
from vqf.runs.checkpoint import latest_checkpoint

CPU = torch.device("cpu")
LIMIT = 4
IDLE = {1: 1.0, 2: 1.9, 3: 2.7, 4: 3.5}  # speed by number of threads
BUSY = {1: 1.0, 2: 1.8, 3: 2.4, 4: 0.1}  # beside a busy program
CROWDED = {1: 0.9, 2: 0.1, 3: 0.08, 4: 0.05}


class Machine:
    """A machine with a clock; a step takes one second at speed 1."""

    def __init__(self, speeds: dict[int, float]) -> None:
        self.speeds, self.now, self.measurements = speeds, 0.0, 0
        self.tuner = ThreadTuner(self.measure, lambda: self.now)

    def measure(self, count: int) -> float:
        self.measurements += count == 1
        self.now += MEASURE_SECONDS
        return self.speeds[count]

    def train(self, seconds: float, work: str = "stage1", factor: float = 1.0) -> int:
        """Train for so long; returns the number of threads at the end."""
        stop = self.now + seconds
        while self.now < stop:
            with self.tuner.watch(work):
                self.now += 0.1 * factor / self.speeds[torch.get_num_threads()]
        return torch.get_num_threads()


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(LIMIT)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def machine() -> Machine:
    machine = Machine(IDLE)
    machine.tuner.configure("auto", CPU)
    return machine


def set_limit(count: int) -> None:
    """Let torch use so many threads by itself, as in a new process."""
    torch.set_num_threads(count)
    cpu_threads.count = 0


def start(speeds: dict[int, float]) -> int:
    torch.set_num_threads(max(speeds))
    machine = Machine(speeds)
    machine.tuner.configure("auto", CPU)
    return machine.train(1)


@pytest.mark.parametrize(("speeds", "chosen"), [(IDLE, 4), (BUSY, 3), (CROWDED, 1), ({1: 1.0, 2: 0.02}, 1)])
def test_a_stage_starts_with_the_fastest(speeds: dict[int, float], chosen: int) -> None:
    assert start(speeds) == chosen


@given(st.dictionaries(st.integers(1, 4), st.floats(0.01, 9), min_size=4, max_size=4))
def test_no_other_number_is_clearly_faster(speeds: dict[int, float]) -> None:
    chosen = start(speeds)
    assert max(speeds.values()) <= 1.25 * speeds[chosen]
    assert chosen == 4 or speeds[chosen] >= 1.25 * speeds[4]


def test_slow_steps_are_noticed_and_all_threads_come_back(machine: Machine) -> None:
    assert machine.train(10) == 4 and machine.measurements == 1
    machine.speeds = CROWDED
    assert machine.train(2 * WINDOW_SECONDS) == 1 and machine.measurements == 2
    machine.speeds = IDLE
    assert machine.train(RETRY_SECONDS + 1) == 4 and machine.measurements == 3
    assert machine.train(1000) == 4 and machine.measurements == 3


def test_a_single_slow_step_and_steps_twice_as_long_change_nothing(machine: Machine) -> None:
    machine.train(100)
    with machine.tuner.watch("stage1"):
        machine.now += 2.0
    machine.train(100)
    machine.train(100, factor=2)  # the discriminator starts
    machine.train(100, "tokenize", factor=30)  # other work has its own times
    assert machine.measurements == 1


def test_measuring_takes_little_time_however_slow_the_steps_stay(machine: Machine) -> None:
    machine.train(100)
    machine.train(3000, factor=10)
    assert machine.measurements <= 2 + 3000 / RETRY_SECONDS


def test_a_fixed_number_is_never_measured(machine: Machine) -> None:
    machine.tuner.configure(2, CPU)
    assert machine.train(100) == 2 and machine.train(100, factor=9) == 2
    machine.tuner.configure(7, CPU)  # more than torch would use: the digits count
    assert torch.get_num_threads() == 7
    machine.tuner.configure("auto", CPU)  # the next job of a sweep
    assert torch.get_num_threads() == LIMIT == machine.tuner.limit
    assert machine.measurements == 0


def test_a_gpu_several_processes_and_a_single_thread_are_left_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.tuner.configure("auto", torch.device("cuda"))
    machine.train(50)
    with monkeypatch.context() as patch:
        patch.setattr(comm, "world_size", lambda: 2)
        machine.tuner.configure("auto", CPU)
        machine.train(50)
    assert torch.get_num_threads() == LIMIT
    torch.set_num_threads(1)  # OMP_NUM_THREADS=1, as torchrun sets it
    machine.tuner.configure("auto", CPU)
    assert machine.train(50) == 1
    assert machine.measurements == 0


def test_the_user_sets_the_limit(machine: Machine) -> None:
    machine.train(1)
    torch.set_num_threads(2)
    machine.tuner.configure("auto", CPU)
    assert machine.train(1) == 2
    assert machine.tuner.limit == 2


@pytest.mark.parametrize(("speeds", "before", "after"), [(BUSY, 2, 2), (IDLE, 3, 3), (CROWDED, 4, 1), (IDLE, 9, 4)])
def test_a_resumed_run_keeps_its_number_unless_it_is_several_times_slower(
    machine: Machine, speeds: dict[int, float], before: int, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    machine.speeds = speeds
    with caplog.at_level(logging.WARNING, "vqf"):
        machine.tuner.resume(before)
        assert machine.train(1) == after
    expected = [f"not bit for bit the run that was saved: threads {before} → {after}"] if before != after else []
    assert [record.getMessage() for record in caplog.records] == expected


def test_every_choice_is_logged(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vqf"):
        machine.train(50)
        machine.speeds = BUSY
        machine.train(50)
    assert [record.getMessage() for record in caplog.records] == [
        "threads=auto: 4 threads, 3.5 times as fast as 1",
        "threads=auto: from here on 3 of 4 threads, 24 times as fast as all of them beside other programs",
    ]


def test_measuring_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MEASURE_SECONDS", 0.01)
    state = torch.get_rng_state()
    assert threads.measure_speed(1) > 0
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


def test_auto_computes_the_digits_of_the_chosen_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "measure", {1: 1.0, 2: 1.9}.__getitem__)
    set_limit(2)
    Stage1(compose(*TINY, "device=cpu"), tmp_path / "auto").run()
    Stage1(compose(*TINY, "device=cpu", "threads=2"), tmp_path / "fixed").run()
    assert weights(tmp_path / "auto") == weights(tmp_path / "fixed")
    assert lines(tmp_path / "auto") == lines(tmp_path / "fixed")


def test_auto_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process would choose another number by itself."""
    Stage1(compose(*TINY, "device=cpu", "threads=2"), tmp_path / "fixed").run()
    set_limit(2)
    monkeypatch.setattr(cpu_threads, "measure", {1: 1.0, 2: 1.9}.__getitem__)
    with monkeypatch.context() as patch:
        interrupt_after(3, patch, "stage1")
        with pytest.raises(KilledError):
            Stage1(compose(*TINY, "device=cpu"), tmp_path / "auto").run()
    monkeypatch.setattr(cpu_threads, "measure", {1: 1.9, 2: 1.0}.__getitem__)
    Stage1(compose(*TINY, "device=cpu", "resume=true"), tmp_path / "auto").run()
    found = latest_checkpoint(tmp_path / "auto")
    assert found is not None and found.state["threads"] == torch.get_num_threads() == 2
    assert weights(tmp_path / "auto") == weights(tmp_path / "fixed")


def test_the_engine_sets_the_number() -> None:
    make_engine(compose("device=cpu", "threads=3"))
    assert torch.get_num_threads() == 3
