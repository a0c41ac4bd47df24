"""Cached tokens: whole or not there."""

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.composing import compose
from tests.pipelines.test_loop import TINY
from vqf.errors import UserError
from vqf.pipelines import atomic
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2

SHORT = [*TINY, "steps=1"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tokenizer")
    Stage1(compose(*SHORT), run).run()
    return run


def train(tokenizer: Path, run: Path, *words: str) -> None:
    Stage2(compose(*SHORT, "pipeline=stage2", f"run={tokenizer}", *words), run).run()


def test_damaged_ones_are_named_and_made_anew(tokenizer: Path, tmp_path: Path) -> None:
    train(tokenizer, tmp_path / "one")
    file = tmp_path / "one" / "tokens" / "train.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    words = f"tokens.root={file.parent}"
    with pytest.raises(
        UserError, match=r"^tokens\.root: .*train\.safetensors is damaged .*; delete it, and it is made"
    ):
        train(tokenizer, tmp_path / "two", words)
    file.unlink()
    train(tokenizer, tmp_path / "two", words)
    assert file.read_bytes() == whole


def test_a_disk_without_room_for_them(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "save_file", full)
    with pytest.raises(UserError) as caught:
        train(tokenizer, tmp_path)
    file = tmp_path / "tokens" / "train.safetensors"
    assert str(caught.value) == (
        f"tokens.root: {file} cannot be written: No space left on device; make room, or name another"
    )
    assert list(file.parent.iterdir()) == []
