"""Damaged JSON, YAML and text files of a run are named, and set aside where a new one is written."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.run_files.damage import DAMAGES, KINDS, damage
from vqf.run_files.aside import aside_path, make_way, warn_once
from vqf.run_files.records import read_config_record, read_record, read_tail, take_record
from vqf.run_files.shapes import DETAILS, INVALID, METRICS, SUMMARY, Shape, is_count, is_text, keep_valid

CONTENT = {"codes": {"counts": [3, 0, 1]}, "best": {"captions": ["20 dB"]}}

keys = st.sampled_from([*METRICS, *DETAILS["*"], *SUMMARY, "psnr"])  # type: ignore[misc, call-overload, index]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4))


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "details.json").write_text(json.dumps(CONTENT))
    return tmp_path / "details.json"


@given(values, st.sampled_from([SUMMARY, DETAILS, METRICS]))
def test_what_is_kept_has_the_shape(value: Any, shape: Shape) -> None:
    invalid = set[str]()
    kept = keep_valid(value, shape, invalid)
    again = set[str]()
    assert kept is INVALID or ((keep_valid(kept, shape, again) == kept or kept != kept) and not again)
    assert bool(invalid) == (json.dumps(kept, default=str) != json.dumps(value))


def test_a_list_is_kept_whole_or_not_at_all() -> None:
    invalid = set[str]()
    content = {"a": {"names": ["x", 3], "n": 1, "other": [None]}, "b": 5}
    shape = {"a": {"names": [is_text], "n": is_count}, "b": {}}
    assert keep_valid(content, shape, invalid) == {"a": {"n": 1, "other": [None]}}
    assert invalid == {"a.names", "b"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_record_is_named_once(path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    damage(path, kind)
    for _ in range(2):
        read_record(path, DETAILS)
    assert len(caplog.messages) == 1
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in caplog.messages)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_that_is_written_anew_is_set_aside(path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    (path.parent / "aside-details.json").write_text("of an earlier time")
    content = b"" if kind == "folder" else DAMAGES[kind](path.read_bytes())
    damage(path, kind)
    take_record(path, DETAILS)
    assert not path.exists() and (path.parent / "aside-details.json").read_text() == "of an earlier time"
    moved = path.parent / "aside-2-details.json"
    assert moved.is_dir() if kind == "folder" else moved.read_bytes() == content
    (message,) = caplog.messages
    assert message.startswith(f"{path}: ") and message.endswith("; moved to aside-2-details.json")


def test_whole_and_missing_records_are_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert take_record(path, DETAILS) == read_record(path, DETAILS) == CONTENT
    assert read_record(path.with_name("none"), DETAILS) == {} and take_record(path.with_name("none"), DETAILS) == {}
    make_way(path)
    assert path.exists() and caplog.messages == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_config_is_named(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("steps: 3\nmodel:\n  name: x\n")
    damage(path, kind)
    read_config_record(path)
    assert len(caplog.messages) <= 1
    if kind in ("nul", "bytes", "nested", "folder"):
        assert caplog.messages[0].startswith(f"{path}: cannot be read (")


def test_the_end_of_a_long_text(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    assert read_tail(path) == ""
    path.write_bytes(b"\xff" * 100 + b"the end")
    assert read_tail(path, 7) == "the end" and read_tail(path).endswith("\ufffdthe end")


def test_a_free_name_is_chosen(tmp_path: Path) -> None:
    for expected in ("aside-a", "aside-2-a", "aside-3-a"):
        assert aside_path(tmp_path / "a").name == expected
        (tmp_path / expected).touch()
