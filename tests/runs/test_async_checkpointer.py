"""AsyncCheckpointer: training does not wait for the disk, retention, and a full disk."""

import errno
import logging
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.support.composing import compose
from tests.training.test_trainer import TINY, lines
from vqf import atomic
from vqf.batch import Batch
from vqf.errors import UserError
from vqf.pipelines.full import Full
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.runs import checkpoint as checkpoints
from vqf.runs import checkpoint_writer
from vqf.runs.async_checkpointer import AsyncCheckpointer
from vqf.runs.checkpoint import latest_checkpoint
from vqf.runs.retention import BestCriterion, parse_best_criterion
from vqf.runs.snapshot import Snapshot
from vqf.training.tokenizer_task import TokenizerTask

WORDS = {"keep": 2, "background": True, "on_failure": "stop"}
FULL = OSError(errno.ENOSPC, "No space left on device")


def snapshot(step: int, psnr: float | None = None, size: int = 3) -> Snapshot:
    look = None if psnr is None else {"step": step, "values": {"psnr": psnr}}
    state = {"kind": "stage1", "step": step, "best": psnr, "last_validation": look}
    return Snapshot(state, OmegaConf.create({}), {"model": {"a": torch.full((size,), float(step))}}, {})


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[AsyncCheckpointer]:
    made = make(tmp_path)
    yield made
    made.close()


def make(run_dir: Path, best: BestCriterion | None = None, **words: Any) -> AsyncCheckpointer:
    return AsyncCheckpointer(run_dir, OmegaConf.create({**WORDS, **words}), best, before_write=lambda: None)


def saved(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").glob("step-*"))]


class Gate:
    """A disk whose writes the test releases one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.writes = threading.Event(), 0
        original = checkpoint_writer.write_checkpoint

        def save(*arguments: Any, **words: Any) -> Path:
            self.writes += 1
            assert self.open.wait(30)
            return original(*arguments, **words)

        monkeypatch.setattr(checkpoint_writer, "write_checkpoint", save)


def test_a_step_does_not_wait_for_the_disk(
    saver: AsyncCheckpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    saver.save(snapshot(1))
    saver.check()
    assert saved(tmp_path) == [] and not gate.open.is_set()
    gate.open.set()
    saver.wait()
    assert saved(tmp_path) == [1]


def test_without_background_a_save_waits(tmp_path: Path) -> None:
    saver = make(tmp_path, background=False)
    saver.save(snapshot(1))
    assert saved(tmp_path) == [1]
    saver.close()


def test_on_a_slow_disk_the_newest_snapshot_replaces_a_queued_one(
    saver: AsyncCheckpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "vqf")
    gate = Gate(monkeypatch)
    for step in range(1, 6):
        saver.save(snapshot(step))
    gate.open.set()
    saver.wait()
    assert saved(tmp_path) == [1, 5] and gate.writes == 2
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"step {step} is not saved" for step in (2, 3, 4)
    ]


def test_on_a_slow_disk_the_best_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a validation waits for the disk, since its checkpoint may be the best."""
    words = ["evaluate.every=2", "checkpoint.every=1", "checkpoint.best=psnr", "checkpoint.keep=1"]
    original = checkpoint_writer.write_checkpoint

    def slow(*arguments: Any, **words: Any) -> Path:
        time.sleep(0.3)
        return original(*arguments, **words)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", slow)
    Stage1(compose(*TINY, *words), tmp_path).run()
    seen = {line["step"]: line["validation/psnr"] for line in lines(tmp_path) if "validation/psnr" in line}
    assert list(seen) == [2, 4, 6]
    assert saved(tmp_path) == sorted({max(seen, key=lambda step: seen[step]), 6})


def test_a_validation_is_stored_in_the_checkpoint_before_it(saver: AsyncCheckpointer, tmp_path: Path) -> None:
    saver.save(snapshot(1))
    saver.update_state(snapshot(1, psnr=30.0).state)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    found = checkpoints.open_checkpoint(folder)
    assert found.state["last_validation"] == {"step": 1, "values": {"psnr": 30.0}}
    assert torch.equal(found.load_weights("model")["a"], torch.ones(3))


def test_a_validation_is_stored_when_a_failed_write_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = make(tmp_path, on_failure="continue")
    with monkeypatch.context() as patch:
        fill(patch)
        saver.save(snapshot(1))
        saver.update_state(snapshot(1, psnr=30.0).state)
    saver.flush()
    found = latest_checkpoint(tmp_path)
    assert found and found.state["last_validation"] == {"step": 1, "values": {"psnr": 30.0}}
    saver.close()


def test_a_validation_that_cannot_be_stored_leaves_the_checkpoint_unchanged(
    saver: AsyncCheckpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.save(snapshot(1))
    saver.wait()

    def full(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(checkpoint_writer, "link_or_copy", full)
    with pytest.raises(UserError, match=r"step 1 cannot be written .*; step-00000001 is kept"):
        saver.update_state(snapshot(1, psnr=30.0).state)
    found = latest_checkpoint(tmp_path)
    assert found and found.state["last_validation"] is None


def test_a_disk_without_hard_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "a").write_bytes(b"content")
    atomic.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"


@pytest.mark.parametrize(("every", "kept"), [(None, [5, 7]), (4, [4, 5, 7])])
def test_the_checkpoint_for_a_rollback_is_kept(tmp_path: Path, every: int | None, kept: list[int]) -> None:
    words = OmegaConf.create({**WORDS, "background": False})
    saver = AsyncCheckpointer(tmp_path, words, None, before_write=lambda: None, every=every)
    for step in (3, 4, 5, 7):
        saver.save(snapshot(step))
    assert saved(tmp_path) == kept
    saver.close()


def test_a_snapshot_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training continues before the thread starts: it must write neither weights nor moments of a later step."""
    gate = Gate(monkeypatch)
    kept: dict[int, Any] = {}
    step = TokenizerTask.step

    def stepped(self: TokenizerTask, number: int, batch: Batch) -> Any:
        values = step(self, number, batch)
        if number == 1:
            kept["weights"] = {key: each.clone() for key, each in self.model.state_dict().items()}
            moments = self.optimizers["model"].state_dict()["state"]
            kept["moments"] = {number: entry["exp_avg"].clone() for number, entry in moments.items()}
        if number == 5:
            gate.open.set()
        return values

    monkeypatch.setattr(TokenizerTask, "step", stepped)
    Stage1(compose(*TINY), tmp_path).run()
    found = checkpoints.open_checkpoint(tmp_path / "checkpoints" / "step-00000002")
    weights, states = found.load_weights("model"), found.load_optimizers()["optimizers"]["model"]["state"]
    assert all(torch.equal(weights[key], each) for key, each in kept["weights"].items())
    assert all(torch.equal(states[number]["exp_avg"], each) for number, each in kept["moments"].items())
    last = latest_checkpoint(tmp_path)
    assert last and not torch.equal(
        last.load_optimizers()["optimizers"]["model"]["state"][0]["exp_avg"], kept["moments"][0]
    )


@pytest.mark.parametrize(("higher", "kept"), [(True, [2, 5]), (False, [3, 5])])
def test_the_best_is_kept_beside_the_newest(tmp_path: Path, higher: bool, kept: list[int]) -> None:
    saver = make(tmp_path, BestCriterion("psnr", higher), keep=1, background=False)
    for step, psnr in enumerate([20.0, 30.0, 10.0, float("nan"), None], 1):  # type: ignore[arg-type]
        saver.save(snapshot(step, psnr))
    assert saved(tmp_path) == kept
    saver.close()


def test_a_validation_of_an_earlier_step_does_not_count() -> None:
    state = {"step": 4, "last_validation": {"step": 2, "values": {"psnr": 30.0}}}
    assert BestCriterion("psnr", True).score(state) == -float("inf")
    assert BestCriterion("psnr", False).score({**state, "step": 2}) == -30.0


def test_only_validation_metrics_with_a_direction_can_be_best() -> None:
    assert parse_best_criterion(None, {}) is None
    assert parse_best_criterion("dead", {"usage": True, "dead": False}) == BestCriterion("dead", higher_is_better=False)
    with pytest.raises(UserError) as caught:
        parse_best_criterion("pnsr", {"psnr": True, "usage": True})
    assert str(caught.value) == (
        "checkpoint.best: unknown validation metric 'pnsr'. Did you mean 'psnr'? Known: psnr, usage."
    )


@pytest.mark.parametrize(
    ("best", "first", "second"), [("psnr", "psnr", None), ("nats_per_token", None, "nats_per_token")]
)
def test_each_stage_has_the_best_that_it_can_measure(
    tmp_path: Path, best: str, first: str | None, second: str | None
) -> None:
    full = Full(compose("pipeline=full", f"checkpoint.best={best}"), tmp_path)
    assert full._stage_config(tmp_path / "stage1").checkpoint.best == first
    assert full._stage_config(tmp_path / "stage2").checkpoint.best == second


@pytest.mark.parametrize("pipeline", [Full, Stage2])
def test_a_mistake_in_checkpoint_best_is_reported_before_anything_is_made(tmp_path: Path, pipeline: type) -> None:
    Stage1(compose(*TINY, "steps=1"), tmp_path / "tokenizer").run()
    config = compose(f"run={tmp_path / 'tokenizer'}", "checkpoint.best=ndb")
    with pytest.raises(UserError, match=r"^checkpoint\.best: unknown validation metric 'ndb'\."):
        pipeline(config, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_a_new_best_validation_is_saved_at_once_and_kept(tmp_path: Path) -> None:
    words = ["evaluate.every=1", "checkpoint.every=50", "checkpoint.best=psnr", "checkpoint.keep=1", "steps=8"]
    Stage1(compose(*TINY, *words, "checkpoint.background=false"), tmp_path).run()
    seen = {line["step"]: line["validation/psnr"] for line in lines(tmp_path) if "validation/psnr" in line}
    best = max(seen, key=lambda step: seen[step])
    assert len(seen) == 8
    assert saved(tmp_path) == sorted({best, 8})


def test_a_full_disk_stops_the_run_in_one_line(
    saver: AsyncCheckpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.save(snapshot(1))
    saver.wait()
    fill(monkeypatch)
    saver.save(snapshot(2))
    with pytest.raises(UserError) as caught:
        wait(saver)
    folder = tmp_path / "checkpoints"
    assert str(caught.value) == (
        f"the checkpoint of step 2 cannot be written to {folder}: No space left on device; "
        "step-00000001 is kept. Free disk space and continue with resume=true"
    )
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    found = latest_checkpoint(tmp_path)
    assert found and found.step == 1


def wait(saver: AsyncCheckpointer) -> None:
    """Take steps until the thread is done."""
    for _ in range(1000):
        saver.check()
        time.sleep(0.01)
        if saver.in_progress is None:
            return


def fill(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(atomic, "save_file", full)


def test_training_can_continue_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = make(tmp_path, on_failure="continue")
    saver.save(snapshot(1))
    saver.wait()
    with monkeypatch.context() as patch:
        fill(patch)
        saver.save(snapshot(2))
        saver.wait()
    assert (
        "step 2 cannot be written" in caplog.text
        and "training continues, the next checkpoint is tried as usual" in caplog.text
    )
    assert saved(tmp_path) == [1]
    saver.save(snapshot(3))
    saver.flush()
    assert saved(tmp_path) == [1, 3]
    saver.close()


def test_the_last_checkpoint_is_retried_and_never_lost_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = make(tmp_path, on_failure="continue")
    with monkeypatch.context() as patch:
        fill(patch)
        saver.save(snapshot(1))
        with pytest.raises(UserError, match=r"step 1 cannot be written .*; there is no earlier one"):
            saver.flush()
    saver.flush()
    assert saved(tmp_path) == [1]
    saver.close()


def test_a_bug_in_the_thread_is_not_taken_for_a_full_disk(
    saver: AsyncCheckpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "save_file", lambda *_: {}["a bug"])
    saver.save(snapshot(1))
    with pytest.raises(KeyError, match="a bug"):
        saver.wait()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizers.pt", "manifest.json"])
def test_a_file_that_may_not_grow_is_a_full_disk_for_every_writer(tmp_path: Path, name: str) -> None:
    """The operating system refuses the write: safetensors and torch report that in different ways."""
    path, big = tmp_path / name, torch.zeros(100_000)
    writers = {
        "model.safetensors": lambda: atomic.write_weights({"a": big}, path),
        "optimizers.pt": lambda: atomic.write_torch({"a": big}, path),
        "manifest.json": lambda: path.write_text("0" * 400_000),
    }
    with limited(64_000), pytest.raises(OSError) as caught:
        writers[name]()
    assert caught.value.errno == errno.EFBIG


class limited:  # noqa: N801
    """Limit the size of every file, in bytes."""

    def __init__(self, size: int) -> None:
        self.size, self.before = size, resource.getrlimit(resource.RLIMIT_FSIZE)

    def __enter__(self) -> None:
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *exception: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


@pytest.mark.parametrize("answer", ["stop", "continue"])
def test_a_run_on_a_disk_that_is_full_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    """The disk is full at steps 3 and 4, for checkpoints, log and images; the log loses no line."""
    caplog.set_level(logging.INFO, "vqf")
    Stage1(compose(*TINY), tmp_path / "whole").run()
    limit = limited(500)
    step = TokenizerTask.step

    def stepped(self: TokenizerTask, number: int, batch: Batch) -> Any:
        if number == 2:
            limit.__enter__()
        if number == 4:
            limit.__exit__()
        return step(self, number, batch)

    monkeypatch.setattr(TokenizerTask, "step", stepped)
    words = [f"checkpoint.on_failure={answer}", "checkpoint.background=false", "checkpoint.every=1"]
    cut = tmp_path / "cut"
    try:
        if answer == "stop":
            with pytest.raises(
                UserError, match=r"step 3 cannot be written to .*: File too large; step-00000002 is kept"
            ):
                Stage1(compose(*TINY, *words), cut).run()
        else:
            Stage1(compose(*TINY, *words), cut).run()
    finally:
        limit.__exit__()
    assert saved(cut) == ([1, 2] if answer == "stop" else [1, 2, 5, 6])
    if answer == "stop":
        monkeypatch.setattr(TokenizerTask, "step", step)
        Stage1(compose(*TINY, *words, "resume=true"), cut).run()
    assert lines(cut) == lines(tmp_path / "whole")


SMALL_DISK = """
import subprocess, sys
run, *command = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "none", run, "-o", "size=5m"], check=True)
done = subprocess.run(command, capture_output=True, text=True)
names = subprocess.run(["ls", f"{run}/checkpoints"], capture_output=True, text=True).stdout.split()
print(done.returncode, *names, done.stderr, sep="\\n")
"""


def mounts() -> bool:
    """Tell whether a process may mount a small file system here."""
    return subprocess.run([*OWN_DISKS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0


OWN_DISKS = ("unshare", "--user", "--map-root-user", "--mount")


@pytest.mark.slow
def test_a_real_disk_that_is_too_small(tmp_path: Path) -> None:
    if not mounts():
        pytest.skip("this machine lets no process mount a tmpfs in a namespace; RLIMIT_FSIZE is tested above")
    words = [*TINY, "checkpoint.keep=0", "checkpoint.every=1", f"run_dir={tmp_path}", "steps=50"]
    command = [sys.executable, "-m", "vqf.run", *words]
    done = subprocess.run(
        [*OWN_DISKS, sys.executable, "-c", SMALL_DISK, str(tmp_path), *command],
        capture_output=True,
        text=True,
        check=True,
    )
    status, *names, said = done.stdout.rstrip("\n").split("\n")
    assert status == "2" and names and all(name.startswith("step-") for name in names)
    assert said.endswith(f"No space left on device; {names[-1]} is kept. Free disk space and continue with resume=true")
