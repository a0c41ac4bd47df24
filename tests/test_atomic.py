"""Atomic writes leave the old file or the new one; file modes follow the umask."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vqf.atomic import atomic_path, atomic_write_text, write_weights


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set the umask for a test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    write_weights({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    with atomic_path(tmp_path / "new" / "atomic.safetensors") as temporary:
        write_weights({"a": torch.ones(2)}, temporary)
    atomic_write_text(tmp_path / "text", "ü")
    assert {mode(path) for path in tmp_path.rglob("*") if path.is_file()} == {0o666 & ~umask}
    assert load_file(tmp_path / "new" / "atomic.safetensors")["a"].tolist() == [1, 1]
    assert (tmp_path / "text").read_bytes() == "ü".encode()


def write_and_fail(path: Path, error: Exception, durable: bool = True) -> None:
    with atomic_path(path, durable) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("durable", [True, False])
def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        write_and_fail(path, RuntimeError(), durable)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    with atomic_path(path, durable) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"


def test_a_block_that_deletes_the_temporary_file_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.unlink()
    assert path.read_text() == "old"


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        write_and_fail(tmp_path / "file", OSError(28, "No space left on device"))
    assert not list(tmp_path.iterdir())
