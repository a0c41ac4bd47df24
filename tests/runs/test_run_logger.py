"""RunLogger: metrics.jsonl has only complete lines, none twice, and loses none while the disk is full."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqf.runs.run_logger import RunLogger


class Recorder:
    """A logger that records calls, or raises an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.seen = error, list[Any]()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._see(step)

    def images(self, step: int, name: str, images: torch.Tensor) -> None:
        self._see(name)

    def close(self) -> None:
        self._see("close")

    def _see(self, what: Any) -> None:
        if self.error:
            raise self.error
        self.seen.append(what)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@given(st.integers(0, 6), st.integers(0, 300))
def test_a_log_truncated_anywhere_continues_with_complete_lines(
    tmp_path_factory: pytest.TempPathFactory, at: int, cut: int
) -> None:
    """A process is killed in the middle of a line, and another resumes from step `at`."""
    run = tmp_path_factory.mktemp("run")
    run_logger = RunLogger(run, [])
    for step in range(1, 7):
        run_logger.scalars(step, {"loss": step / 7})
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    kept = whole[: len(whole) - cut]
    path.write_bytes(kept)
    found = kept.count(b"\n") + (not kept.endswith(b"\n") and kept.endswith(b"}"))
    run_logger = RunLogger(run, [])
    run_logger.truncate_after(at)
    assert steps(run) == list(range(1, min(at, found) + 1))
    run_logger.scalars(9, {"loss": 1.0})
    assert steps(run)[-1] == 9 and len(steps(run)) == min(at, found) + 1


@pytest.mark.parametrize(("validated", "expected"), [(True, ["loss", "validation/psnr"]), (False, ["loss"])])
def test_a_validation_that_the_checkpoint_lacks_is_deleted(
    tmp_path: Path, validated: bool, expected: list[str]
) -> None:
    run_logger = RunLogger(tmp_path, [])
    for step in (1, 2):
        run_logger.scalars(step, {"loss": 1.0})
        run_logger.scalars(step, {"validation/psnr": 30.0})
    run_logger.truncate_after(2, validated)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [key for line in found if line["step"] == 1 for key in list(line)[2:]] == ["loss", "validation/psnr"]
    assert [key for line in found if line["step"] == 2 for key in list(line)[2:]] == expected


def test_a_process_killed_while_it_truncates_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_logger = RunLogger(tmp_path, [])
    run_logger.scalars(1, {"loss": 1.0})
    run_logger.scalars(2, {"loss": 2.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run_logger.truncate_after(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_lines_wait_for_disk_space_and_half_a_line_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_logger = RunLogger(tmp_path, [])
    run_logger.scalars(1, {"loss": 1.0})
    opened = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *exception: object) -> None:
            self.file.close()

        def write(self, text: str) -> None:
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *mode: Full(opened(self, *mode)))
        run_logger.scalars(2, {"loss": 2.0})
        run_logger.scalars(3, {"loss": 3.0})
    assert steps(tmp_path) == [1]
    run_logger.scalars(4, {"loss": 4.0})
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "metrics.jsonl cannot be written: No space left on device; the run continues"
    ]


def test_a_logger_on_a_full_disk_does_not_stop_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full, good = Recorder(OSError(errno.ENOSPC, "No space left on device")), Recorder()
    run_logger = RunLogger(tmp_path, [full, good])
    run_logger.scalars(1, {"loss": 1.0})
    run_logger.images(1, "samples", torch.zeros(1, 3, 1, 1))
    run_logger.close()
    assert good.seen == [1, "samples", "close"]
    assert len(caplog.records) == 1


def test_a_bug_in_a_logger_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    run_logger = RunLogger(tmp_path, [Recorder(KeyError("a bug"))])
    with pytest.raises(KeyError, match="a bug"):
        run_logger.scalars(1, {"loss": 1.0})


def test_details_keep_the_newest_of_every_name(tmp_path: Path) -> None:
    run_logger = RunLogger(tmp_path, [])
    run_logger.write_details({"codes": {"counts": [1]}, "best": {}})
    run_logger.write_details({"codes": {"counts": [2]}})
    run_logger.write_details({})
    assert json.loads((tmp_path / "details.json").read_text()) == {"codes": {"counts": [2]}, "best": {}}
