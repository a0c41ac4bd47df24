"""Signals of a scheduler to a running job, acted on between two steps."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.composing import compose
from tests.training.test_trainer import TINY, lines, weights
from vqf.batch import Batch
from vqf.dataloading.loader import sequential_batches
from vqf.pipelines.full import Full
from vqf.pipelines.stage1 import Stage1
from vqf.runs.checkpoint import latest_checkpoint
from vqf.training.preemption import PreemptionSignals
from vqf.training.tokenizer_task import TokenizerTask

LONG = [*TINY, "checkpoint.every=50"]


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def during(step: int, monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Send signals to this process in the middle of a step."""
    original = TokenizerTask.step

    def stepped(self: TokenizerTask, number: int, batch: Batch) -> Any:
        if number == step:
            for each in numbers:
                signal.raise_signal(each)
        return original(self, number, batch)

    monkeypatch.setattr(TokenizerTask, "step", stepped)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("uninterrupted")
    Stage1(compose(*LONG), run).run()
    return run


@pytest.mark.parametrize(("step", "number"), [(0, signal.SIGTERM), (3, signal.SIGHUP), (5, signal.SIGTERM)])
def test_a_signal_saves_after_the_step_and_stops(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Path,
    step: int,
    number: signal.Signals,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "vqf")
    with monkeypatch.context() as patch:
        during(step, patch, number)
        with pytest.raises(SystemExit) as ended:
            Stage1(compose(*LONG), tmp_path).run()
    assert ended.value.code == {signal.SIGTERM: 143, signal.SIGHUP: 129}[number]
    assert saved(tmp_path) == [f"step-{step + 1:08d}"]
    assert f"stopped by {number.name}; saved at step {step + 1}, continue with resume=true" in caplog.text
    Stage1(compose(*LONG, "resume=true"), tmp_path).run()
    assert lines(tmp_path) == lines(uninterrupted)
    assert weights(tmp_path) == weights(uninterrupted)


def test_sigusr1_saves_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path) -> None:
    during(2, monkeypatch, signal.SIGUSR1, signal.SIGUSR1)
    Stage1(compose(*LONG), tmp_path).run()
    assert saved(tmp_path) == ["step-00000003", "step-00000006"]
    assert lines(tmp_path) == lines(uninterrupted)
    assert weights(tmp_path) == weights(uninterrupted)


def test_sigterm_in_the_last_validation_keeps_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = TokenizerTask.evaluate

    def signaled(self: TokenizerTask, *arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, *arguments)

    monkeypatch.setattr(TokenizerTask, "evaluate", signaled)
    config = compose(*TINY, "pipeline=full", "stage2.steps=1", "evaluate.every=50")
    with pytest.raises(SystemExit) as ended:  # and stage 2 does not begin
        Full(config, tmp_path).run()
    assert ended.value.code == 143
    assert lines(tmp_path / "stage1")[-1]["step"] == 6 and not (tmp_path / "stage2").exists()


def test_previous_handlers_are_restored(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    Stage1(compose(*TINY, "steps=1"), tmp_path).run()
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_ignored_sighup_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        during(2, monkeypatch, signal.SIGHUP)
        Stage1(compose(*LONG), tmp_path).run()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert saved(tmp_path) == ["step-00000006"]


def test_a_closed_terminal_saves_and_stops(tmp_path: Path) -> None:
    """The terminal vanishes, so that every later write to it fails, and the kernel sends SIGHUP."""
    words = [*LONG, "steps=4000", f"run_dir={tmp_path}", "workers=1", "evaluate.every=4000", "log.every=1"]
    terminal, inner = os.openpty()
    job = subprocess.Popen(
        [sys.executable, "-m", "vqf.run", *words],
        **dict.fromkeys(("stdin", "stdout", "stderr"), inner),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(inner)
    while not (tmp_path / "metrics.jsonl").exists() or len(lines(tmp_path)) < 3:
        os.read(terminal, 4096)
    os.close(terminal)
    assert job.wait(60) == 129
    found = latest_checkpoint(tmp_path)
    assert found and found.step == lines(tmp_path)[-1]["step"] < 4000
    assert f"stopped by SIGHUP; saved at step {found.step}" in (tmp_path / "log.txt").read_text()


def test_in_another_thread_no_signal_is_recorded() -> None:
    found: list[bool] = []

    def run() -> None:
        with PreemptionSignals() as signals:
            found.append(signals.should_save())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


class SignalingSplit:
    """Images that load slowly; at the third, the loading process gets a signal."""

    fingerprint = "signaling"

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return 6

    def item(self, epoch: int, index: int) -> Any:
        import torch

        from vqf.batch import Sample

        if index == 2:
            subprocess.run(["kill", f"-{self.number}", str(os.getpid())], check=True)
            time.sleep(0.2)
        return Sample(torch.full((3, 1, 1), float(index)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_data_workers_ignore_signals_of_the_scheduler(number: int) -> None:
    shown = [batch.images[:, 0, 0, 0].tolist() for batch in sequential_batches(SignalingSplit(number), 2, workers=1)]  # type: ignore[index]
    assert shown == [[0, 1], [2, 3], [4, 5]]


@pytest.fixture
def thread_at_birth() -> Iterator[None]:
    """Start a second thread in every forked process, as one does that inherits an open queue."""
    on = [True]
    os.register_at_fork(
        after_in_child=lambda: on and threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    )
    yield
    on.clear()


@pytest.mark.usefixtures("thread_at_birth")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_every_thread_of_a_data_worker_ignores_signals(number: int) -> None:
    for _ in range(3):  # the kernel chooses the thread that a signal is for
        assert len(list(sequential_batches(SignalingSplit(number), 2, workers=1))) == 3  # type: ignore[arg-type]


def test_loading_leaves_the_signal_mask_of_this_process() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    loading = sequential_batches(SignalingSplit(0), 2, workers=1)  # type: ignore[arg-type]
    next(loading)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    loading.close()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_job_of_which_every_process_gets_sigterm(tmp_path: Path, workers: int) -> None:
    """As SLURM does at the end of the time: SIGTERM to all processes; the same command resumes."""
    words = [*LONG, "steps=400", f"workers={workers}", f"run_dir={tmp_path}", "resume=true", "data.flip=true"]
    command = [sys.executable, "-m", "vqf.run", *words]
    ended = []
    for _ in range(2):
        before = len(lines(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0
        job = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
        while not (tmp_path / "metrics.jsonl").exists() or len(lines(tmp_path)) < before + 3:
            assert job.poll() is None
            time.sleep(0.02)
        os.killpg(job.pid, signal.SIGTERM)
        _, said = job.communicate(timeout=60)
        ended.append((job.returncode, said))
        found = latest_checkpoint(tmp_path)
        assert found and found.step == lines(tmp_path)[-1]["step"]
    assert ended == [(143, "")] * 2
