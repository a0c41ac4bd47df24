"""A log is cut to the step of a checkpoint: intact lines stay, damaged ones are set aside, missing ones are named."""

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.run_files.damage import DAMAGES
from vqf.run_files.log_repair import truncate_log
from vqf.run_files.metrics_log import parse_line
from vqf.runs.run_logger import RunLogger

STEPS = 10
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def log_lines() -> list[bytes]:
    lines = []
    for step in range(1, STEPS + 1):
        lines.append(json.dumps({"step": step, "time": step / 4, "loss": 1 / step}).encode())
        if step % 5 == 0:
            lines.append(json.dumps({"step": step, "time": step / 4, "validation/psnr": 20.0 + step}).encode())
    return lines


def is_kept(line: bytes, last: tuple[int, bool]) -> bool:
    values = json.loads(line)
    return (values["step"], b"validation/" in line) <= last


@in_one_folder
@given(
    place=st.integers(0, len(log_lines()) - 1),
    content=st.binary(max_size=30) | st.sampled_from([b'{"step": 900}', b'{"step": 0, "validation/x": 1}', b"[1]"]),
    last=st.tuples(st.integers(0, STEPS + 1), st.booleans()),
)
def test_no_line_is_lost(tmp_path: Path, place: int, content: bytes, last: tuple[int, bool]) -> None:
    """One line holds anything: every other line up to the checkpoint stays, and what was there instead is kept."""
    for old in tmp_path.iterdir():
        old.unlink()
    lines = log_lines()
    others = [line for line in lines if line != lines[place]]
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "aside-metrics.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in [*lines[:place], content, *lines[place + 1 :]]))
    truncate_log(path, last)
    kept = path.read_bytes().split(b"\n")[:-1]
    assert [line for line in kept if line in others] == [line for line in others if is_kept(line, last)]
    if any(parse_line(part) is None for part in content.split(b"\n")):
        assert aside.exists() and set(content.split(b"\n")) & set(aside.read_bytes().split(b"\n"))
    assert all(parse_line(line) is not None for line in kept)


@pytest.mark.parametrize("step", [0, 3, 900])
def test_a_step_that_is_not_between_its_neighbours_is_damage(
    tmp_path: Path, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    lines = log_lines()
    odd = json.dumps({"step": step, "time": 1.0, "loss": 1.0}).encode()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines[:7], odd, *lines[8:]]) + b"\n")
    assert truncate_log(tmp_path / "metrics.jsonl", (STEPS, True)) == STEPS
    assert (tmp_path / "aside-metrics.jsonl").read_bytes() == odd + b"\n"
    assert caplog.messages == [
        f"{tmp_path / 'metrics.jsonl'}: line 8 is damaged; moved to aside-metrics.jsonl, and left out of the curves"
    ]


def test_an_intact_log_is_not_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = b"\n".join(log_lines()) + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert truncate_log(tmp_path / "metrics.jsonl", (STEPS, True)) == STEPS
    assert (tmp_path / "metrics.jsonl").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"] and caplog.messages == []


@pytest.mark.parametrize("kind", ["cut", "empty", "nul", "bytes", "list", "missing", "folder"])
def test_missing_steps_are_named(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(DAMAGES[kind](b"\n".join(log_lines()) + b"\n"))
    found = 5 if kind == "cut" else 0
    RunLogger(tmp_path, []).truncate_after(STEPS, last_logged=STEPS)
    hole = f"{path}: has no line after step {found}, but the run logged until step {STEPS}; curves lack these"
    assert caplog.messages[-1] == hole
    assert len(caplog.messages) == 1 + (kind in ("bytes", "list", "folder"))


def test_a_log_that_cannot_be_read_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.touch()

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert truncate_log(path, (1, True)) == 0
    assert caplog.messages == [f"{path}: cannot be read (Permission denied); moved to aside-metrics.jsonl"]


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    peaks = []
    for count in (10_000, 40_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(count)))
        tracemalloc.start()
        assert truncate_log(path, (count, True)) == count - 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 10_000
