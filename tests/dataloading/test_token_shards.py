"""Tokens on disk: what is picked from shards, and what becomes of folders that are not as they should be."""

import errno
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.composing import compose
from tests.training.test_trainer import TINY
from vqf import atomic
from vqf.dataloading.order import ShuffledBatches
from vqf.dataloading.token_shards import TokenDataset, TokenShardManifest
from vqf.errors import UserError
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2

SHORT = [*TINY, "steps=1"]
ORIGIN = {"tokenizer": "t", "conditions": "c", "data": "d", "views": "1"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tokenizer")
    Stage1(compose(*SHORT), run).run()
    return run


def train(tokenizer: Path, run: Path, *words: str) -> None:
    Stage2(compose(*SHORT, "pipeline=stage2", f"run={tokenizer}", *words), run).run()


def kept(folder: Path, images: int, rows: int, columns: dict[str, torch.Tensor], views: int = 1) -> TokenShardManifest:
    """Write whole columns into shards."""
    manifest = TokenShardManifest(folder, "train", ORIGIN, images, views, rows)
    manifest.add({})
    for number in manifest.missing_shards():
        part = {name: each[number * rows : (number + 1) * rows] for name, each in columns.items()}
        manifest.add({number: manifest.write(number, part)})
    return manifest


def columns(images: int, views: int) -> dict[str, torch.Tensor]:
    """Rows that differ in every column."""
    row = torch.arange(images * views)
    return {
        "tokens": torch.stack([row, row * 3 + 1], 1).int(),
        "labels": row % images + 100,
        "crop_boxes": (row[:, None] + torch.tensor([0.0, 0.25, 0.5, 0.75])),
        "condition_indices.map": row.view(-1, 1, 1).expand(-1, 2, 3).int() + 7,
    }


def cut(whole: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    count = -(-len(whole["tokens"]) // rows)
    return [{name: each[i * rows : (i + 1) * rows] for name, each in whole.items()} for i in range(count)]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 40), st.data())
def test_what_is_picked_is_that_view_of_that_image(images: int, views: int, rows: int, data: Any) -> None:
    keys = data.draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, images - 1)), min_size=1, max_size=12))
    whole = columns(images, views)
    tokens = TokenDataset(cut(whole, rows), images)
    assert (len(tokens), tokens.num_augmentations, tokens.condition_names) == (images, views, ["map"])
    batch = tokens.gather([epoch for epoch, _ in keys], [index for _, index in keys])
    assert batch.tokens is not None and batch.labels is not None and batch.crop_boxes is not None
    for i, (epoch, index) in enumerate(keys):
        row = (epoch % views) * images + index
        assert torch.equal(batch.tokens[i], whole["tokens"][row].long()) and batch.labels[i] == whole["labels"][row]
        assert torch.equal(batch.crop_boxes[i], whole["crop_boxes"][row])
        assert torch.equal(batch.condition_indices["map"][i], whole["condition_indices.map"][row].long())
    assert batch.tokens.dtype == batch.labels.dtype == batch.condition_indices["map"].dtype == torch.int64


def test_batches_come_in_the_order_of_the_seed(tmp_path: Path) -> None:
    whole = {"tokens": torch.arange(24, dtype=torch.int32)[:, None]}
    order = ShuffledBatches(12, 4, seed=3)
    found = list(kept(tmp_path, 12, 5, whole, views=2).open_dataset().batches(order, 1, 8))
    for step, batch in enumerate(found, 1):
        assert (
            batch.tokens is not None
            and batch.labels is None
            and batch.crop_boxes is None
            and not batch.condition_indices
        )
        assert batch.tokens.flatten().tolist() == [epoch % 2 * 12 + index for epoch, index in order.batch(step)]


def test_shards_are_mapped_not_read(tmp_path: Path) -> None:
    """What is changed in the file afterwards shows: no copy of it was made. (Nobody should; here it is a witness.)"""
    manifest = kept(tmp_path, 4, 4, {"tokens": torch.zeros(4, 5000, dtype=torch.int32)})
    tokens = manifest.open_dataset()
    with manifest.shard_path(0).open("r+b") as file:
        file.seek(-4, 2)
        file.write(struct.pack("<i", 77))
    assert tokens.shards[0]["tokens"][3, -1] == 77


def test_damaged_ones_are_named_and_made_anew(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tokenizer, tmp_path / "one")
    file = tmp_path / "one" / "tokens" / "train-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    words = f"tokens.root={file.parent}"
    train(tokenizer, tmp_path / "two", words)
    assert file.read_bytes() == whole
    assert f"'{file}' differs from its hash in train.json; writing it again" in caplog.messages


def test_a_disk_without_room_for_them(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "save_file", full)
    with pytest.raises(UserError) as caught:
        train(tokenizer, tmp_path)
    file = tmp_path / "tokens" / "train-00000.safetensors"
    assert str(caught.value) == (
        f"tokens.root: {file} cannot be written: No space left on device; free some space, or choose another folder"
    )
    assert [each.name for each in file.parent.iterdir()] == ["train.json"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("")
    manifest = TokenShardManifest(tmp_path / "tokens", "train", ORIGIN, 3, 1)
    with pytest.raises(UserError, match=r"tokens/train\.json cannot be written"):
        manifest.add({})


@pytest.mark.parametrize("key", ORIGIN)
def test_tokens_of_something_else_are_refused(key: str, tmp_path: Path) -> None:
    kept(tmp_path, 3, 2, {"tokens": torch.zeros(3, 1, dtype=torch.int32)})
    with pytest.raises(UserError) as caught:
        TokenShardManifest(tmp_path, "train", {**ORIGIN, key: "x"}, 3, 1)
    assert str(caught.value) == (
        f"tokens.root: {tmp_path / 'train.json'} was made with {key} {ORIGIN[key]}, this run has x; tokens of another "
        f"{key} do not fit. Leave tokens.root out to encode them again"
    )


def test_a_folder_keeps_the_size_of_its_shards(tmp_path: Path) -> None:
    kept(tmp_path, 5, 2, {"tokens": torch.zeros(5, 1, dtype=torch.int32)})
    found = TokenShardManifest(tmp_path, "train", ORIGIN, 5, 1)
    assert (found.rows_per_shard, found.num_shards, found.missing_shards()) == (2, 3, [])
    assert TokenShardManifest(tmp_path, "train", ORIGIN, 5, 1, 2).missing_shards() == []
    with pytest.raises(UserError) as caught:
        TokenShardManifest(tmp_path, "train", ORIGIN, 5, 1, 3)
    assert str(caught.value) == f"rows=3: the shards in {tmp_path} have 2; leave rows out, or delete them"


def whole_manifest(**changes: Any) -> str:
    return json.dumps({"version": 1, "rows": 2, "origin": ORIGIN, "shards": {}, **changes})


BROKEN = {
    "empty": "",
    "binary": "\udcff",
    "no mapping": "[]",
    "deep": "[" * 100_000,
    "nothing in it": "{}",
    "another version": whole_manifest(version=1),
    "no rows": whole_manifest(rows=0),
    "endless rows": '{"version": 1, "rows": 1e999, "origin": {}, "shards": {}}',
    "origin is a word": whole_manifest(origin="d"),
    "shards are a list": whole_manifest(shards=[1]),
    "a shard is a word": whole_manifest(shards={"train-00000.safetensors": "x"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_manifests_that_are_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(BROKEN[name], errors="surrogateescape")
    with pytest.raises(UserError, match=r"train\.json is damaged .*; delete it, and it is written again") as caught:
        TokenShardManifest(tmp_path, "train", ORIGIN, 3, 1)
    assert len(str(caught.value).splitlines()) == 1


STRANGE = {
    "no tokens": {"other": torch.zeros(2, 1)},
    "too few rows": {"tokens": torch.zeros(1, 1)},
    "other columns": {"tokens": torch.zeros(2, 1), "labels": torch.zeros(2)},
    "a number": {"tokens": torch.zeros(())},
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("number", [0, 1])
def test_shards_that_hold_something_else(name: str, number: int, tmp_path: Path) -> None:
    """Their hashes may be right, where somebody else wrote the manifest."""
    manifest = kept(tmp_path, 4, 2, {"tokens": torch.zeros(4, 1)})
    assert load_file(manifest.shard_path(number)).keys() == {"tokens"}
    save_file(STRANGE[name], manifest.shard_path(number))
    with pytest.raises(UserError, match=r"train-0000\d\.safetensors is damaged"):
        manifest.open_dataset()
