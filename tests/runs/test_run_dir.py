"""One process at a time in a run's folder; an unwritable folder is reported in one line before anything is made."""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.runs.test_async_checkpointer import limited
from tests.support.processes import start_process
from tests.test_run import Run, run  # noqa: F401  (a fixture)
from tests.training.test_trainer import TINY
from vqf.errors import UserError
from vqf.run import main
from vqf.runs.checkpoint import latest_checkpoint
from vqf.runs.lock import folder_lock

Process = multiprocessing.process.BaseProcess


def hold(folder: Path, told: Connection, seconds: float) -> None:
    with folder_lock(folder):
        told.send("held")
        time.sleep(seconds)


def holding(folder: Path, seconds: float = 60) -> Process:
    """Start another process that runs in a folder, and return it as soon as it does."""
    mine, theirs = multiprocessing.Pipe(duplex=False)
    process = start_process(hold, folder, theirs, seconds)
    theirs.close()
    assert mine.recv() == "held"
    return process


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Process]:
    """Another process that holds the lock of a folder."""
    process = holding(tmp_path)
    yield process
    process.kill()
    process.join()


def test_one_process_holds_the_lock_until_it_ends(tmp_path: Path, other: Process) -> None:
    with pytest.raises(UserError) as caught, folder_lock(tmp_path):
        pass
    assert str(caught.value) == (
        f"run_dir={tmp_path}: process {other.pid} on {os.uname().nodename} is running there; wait until it ends, or "
        "give another run_dir"
    )
    other.kill()
    other.join()
    with folder_lock(tmp_path):
        pass


def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    """As a worker of a data loader does for a moment."""
    with folder_lock(tmp_path):
        if (child := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
    process = holding(tmp_path, seconds=0)
    process.join()
    assert process.exitcode == 0
    os.kill(child, 9)
    os.waitpid(child, 0)


def ends(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that is refused and return its only line."""
    sys.argv[1:] = list(arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def trained(run: Run, tmp_path: Path) -> Path:  # noqa: F811
    """A run of two steps, made by a command."""
    sys.argv[1:] = [*TINY, "logger=[report]", "steps=2", f"run_dir={tmp_path / 'run'}"]
    main()
    return tmp_path / "run"


def test_a_refused_command_does_not_change_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, words = contents(trained), [*TINY, "logger=[report]", f"run_dir={trained}"]
    assert {"config.yaml", "summary.json", "report.html", "log.txt"} <= {Path(name).name for name in before}
    capsys.readouterr()
    assert "optimizer.lr 0.001 → 0.1" in ends(capsys, *words, "steps=2", "resume=true", "optimizer.lr=0.1")
    assert "steps count from the start" in ends(capsys, *words, "steps=1", "resume=true")
    assert "holds a run at step 2" in ends(capsys, *words, "steps=2")
    for pipeline in ("sample", "evaluate", "check"):
        line = ends(capsys, f"pipeline={pipeline}", f"run={trained}", f"run_dir={trained}")
        assert f"holds a run of pipeline=stage1, which pipeline={pipeline} would overwrite" in line
    assert contents(trained) == before
    found = latest_checkpoint(trained)
    assert found
    (found.path / "model.safetensors").write_bytes(b"damaged")
    before = contents(trained)
    for resume in ("true", "false"):
        assert "none of its checkpoints is intact" in ends(capsys, *words, "steps=2", f"resume={resume}")
    assert contents(trained) == before


@pytest.mark.usefixtures("run")
def test_two_commands_do_not_share_a_run(tmp_path: Path, other: Process, capsys: pytest.CaptureFixture[str]) -> None:
    line = ends(capsys, *TINY, f"run_dir={tmp_path}", "resume=true")
    assert f"process {other.pid} on " in line
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("words", [TINY, ["pipeline=sample", "run=."]])
def test_a_path_that_cannot_be_a_folder(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "cannot be written (" in ends(capsys, *words, f"run_dir={place}")


@pytest.mark.usefixtures("run")
def test_a_disk_that_is_full_from_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with limited(0):
        line = ends(capsys, *TINY, f"run_dir={tmp_path / 'run'}")
    assert line == (
        f"run_dir={tmp_path / 'run'}: cannot be written (File too large); free disk space, or give another run_dir"
    )
