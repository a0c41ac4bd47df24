"""Damaged lines of `metrics.jsonl` are named and passed over, at any length and in little memory."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vqf.run_files.aside import warn_once
from vqf.run_files.metrics_log import MAX_LINE_BYTES, LogTotals, parse_line, read_lines, read_metrics

COUNT = 12  # lines
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


def written(step: int) -> bytes:
    return json.dumps({"step": step, "time": step / 4, "loss": 1 / step, "gradient": "inf"}).encode()


@in_one_folder
@given(place=st.integers(0, COUNT - 1), content=st.binary(max_size=40).filter(lambda raw: b"\n" not in raw))
def test_all_other_lines_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int, content: bytes) -> None:
    warn_once.cache_clear()
    caplog.clear()
    intact = [written(step) for step in range(1, COUNT + 1)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in [*intact[:place], content, *intact[place + 1 :]]))
    steps = [values["step"] for values in read_metrics(path)]
    if parse_line(content) is None:
        assert steps == [step for step in range(1, COUNT + 1) if step != place + 1]
        assert caplog.messages == [f"{path}: line {place + 1} is damaged; left out"]


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"[1]", b"7", b"null", b'"step"', b"{}", b'{"step": "1"}', b'{"step": -1}', b'{"step": true}'),
        *(b'{"step": 1.5}', b'{"step": 1e400}', b'{"step": 1, "loss": [1]}', b'{"step": 1, "loss": null}'),
        *(b'{"step": 1, "time": NaN}', b'{"step": 1, "loss": ' + b"9" * 400 + b"}", b"[" * 10**5, b'{"step": 1'),
        *(b'{"step": 1, "loss": ' + b"9" * 5000 + b"}", b'{"step": 1}{"step": 2}', b'{"step": 1, "l\xff": 1}'),
    ],
)
def test_a_line_of_another_shape_is_damaged(raw: bytes) -> None:
    assert parse_line(raw) is None


def test_numbers_that_are_not_finite_are_none_of_damage() -> None:
    assert parse_line(b'{"step": 1, "a": NaN, "b": -Infinity, "c": "nan"}') is not None


def test_half_a_line_at_the_end_is_not_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(written(1) + b"\n" + written(2)[:-5])
    assert [values["step"] for values in read_metrics(path)] == [1]
    path.write_bytes(written(1) + b"\n" + written(2))
    assert [values["step"] for values in read_metrics(path)] == [1, 2]
    assert caplog.messages == []


def test_many_damaged_lines_are_one_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\n" * 1000 + written(5) + b"\n")
    assert [values["step"] for values in read_metrics(path)] == [5]
    assert caplog.messages == [f"{path}: lines 1, 2, 3, 4, 5, 6, 7, 8 and 992 more are damaged; left out"]


def test_a_line_without_an_end_is_read_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(bytes(3 * MAX_LINE_BYTES + 5) + b"\n" + written(2) + b"\n")
    lines = list(read_lines(path))
    assert [(line.number, line.values is None) for line in lines] == [(1, True)] * 4 + [(2, False)]
    assert b"".join(line.raw for line in lines) == path.read_bytes()


@pytest.mark.parametrize("line", [written(1) + b"\n", b"\0" * 240])
def test_memory_does_not_grow_with_the_length(tmp_path: Path, line: bytes) -> None:
    peaks = []
    for count in (20_000, 60_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_bytes(line * count)
        tracemalloc.start()
        assert sum(1 for _ in read_metrics(path)) in (0, count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 10_000


def test_times_add_up_over_processes() -> None:
    times = [1.0, 5.0, 0.5, 2.5, 0.25]
    totals = LogTotals()
    assert len(list(totals.follow({"step": i, "time": now} for i, now in enumerate(times)))) == 5
    assert (totals.seconds, totals.processes, totals.last_step) == (7.75, 3, 4)
