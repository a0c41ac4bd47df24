"""Cached tokens: reading rows from shards, and damaged or mismatched folders."""

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


def write_shards(
    folder: Path, images: int, rows: int, columns: dict[str, torch.Tensor], views: int = 1
) -> TokenShardManifest:
    """Write columns into shards of `rows` rows."""
    manifest = TokenShardManifest(folder, "train", ORIGIN, images, views, rows)
    manifest.add({})
    for number in manifest.missing_shards():
        shard = {name: column[number * rows : (number + 1) * rows] for name, column in columns.items()}
        manifest.add({number: manifest.write(number, shard)})
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


def to_shards(columns: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    count = -(-len(columns["tokens"]) // rows)
    return [{name: column[i * rows : (i + 1) * rows] for name, column in columns.items()} for i in range(count)]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 40), st.data())
def test_gather_returns_the_view_of_each_image(images: int, views: int, rows: int, data: Any) -> None:
    keys = data.draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, images - 1)), min_size=1, max_size=12))
    rows_of = columns(images, views)
    tokens = TokenDataset(to_shards(rows_of, rows), images)
    assert (len(tokens), tokens.num_augmentations, tokens.condition_names) == (images, views, ["map"])
    batch = tokens.gather([epoch for epoch, _ in keys], [index for _, index in keys])
    assert batch.tokens is not None and batch.labels is not None and batch.crop_boxes is not None
    for i, (epoch, index) in enumerate(keys):
        row = (epoch % views) * images + index
        assert torch.equal(batch.tokens[i], rows_of["tokens"][row].long()) and batch.labels[i] == rows_of["labels"][row]
        assert torch.equal(batch.crop_boxes[i], rows_of["crop_boxes"][row])
        assert torch.equal(batch.condition_indices["map"][i], rows_of["condition_indices.map"][row].long())
    assert batch.tokens.dtype == batch.labels.dtype == batch.condition_indices["map"].dtype == torch.int64


def test_batches_come_in_the_order_of_the_seed(tmp_path: Path) -> None:
    all_rows = {"tokens": torch.arange(24, dtype=torch.int32)[:, None]}
    order = ShuffledBatches(12, 4, seed=3)
    batches = list(write_shards(tmp_path, 12, 5, all_rows, views=2).open_dataset().batches(order, 1, 8))
    for step, batch in enumerate(batches, 1):
        assert (
            batch.tokens is not None
            and batch.labels is None
            and batch.crop_boxes is None
            and not batch.condition_indices
        )
        assert batch.tokens.flatten().tolist() == [epoch % 2 * 12 + index for epoch, index in order.batch(step)]


def test_shards_are_mapped_not_read(tmp_path: Path) -> None:
    """A later change of the file shows in the dataset, which proves that it holds no copy."""
    manifest = write_shards(tmp_path, 4, 4, {"tokens": torch.zeros(4, 5000, dtype=torch.int32)})
    tokens = manifest.open_dataset()
    with manifest.shard_path(0).open("r+b") as file:
        file.seek(-4, 2)
        file.write(struct.pack("<i", 77))
    assert tokens.shards[0]["tokens"][3, -1] == 77


def test_damaged_shards_are_logged_and_written_again(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tokenizer, tmp_path / "one")
    file = tmp_path / "one" / "tokens" / "train-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:20])
    words = f"tokens.root={file.parent}"
    train(tokenizer, tmp_path / "two", words)
    assert file.read_bytes() == content
    assert f"'{file}' differs from its hash in train.json; writing it again" in caplog.messages


def test_a_full_disk_leaves_no_shard(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_tokens_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("")
    manifest = TokenShardManifest(tmp_path / "tokens", "train", ORIGIN, 3, 1)
    with pytest.raises(UserError, match=r"tokens/train\.json cannot be written"):
        manifest.add({})


@pytest.mark.parametrize("key", ORIGIN)
def test_tokens_of_another_provenance_are_refused(key: str, tmp_path: Path) -> None:
    write_shards(tmp_path, 3, 2, {"tokens": torch.zeros(3, 1, dtype=torch.int32)})
    with pytest.raises(UserError) as caught:
        TokenShardManifest(tmp_path, "train", {**ORIGIN, key: "x"}, 3, 1)
    assert str(caught.value) == (
        f"tokens.root: {tmp_path / 'train.json'} was made with {key} {ORIGIN[key]}, this run has x; tokens of another "
        f"{key} do not fit. Leave tokens.root out to encode them again"
    )


def test_a_folder_keeps_the_size_of_its_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, 5, 2, {"tokens": torch.zeros(5, 1, dtype=torch.int32)})
    manifest = TokenShardManifest(tmp_path, "train", ORIGIN, 5, 1)
    assert (manifest.rows_per_shard, manifest.num_shards, manifest.missing_shards()) == (2, 3, [])
    assert TokenShardManifest(tmp_path, "train", ORIGIN, 5, 1, 2).missing_shards() == []
    with pytest.raises(UserError) as caught:
        TokenShardManifest(tmp_path, "train", ORIGIN, 5, 1, 3)
    assert str(caught.value) == f"rows=3: the shards in {tmp_path} have 2; leave rows out, or delete them"


def manifest_text(**changes: Any) -> str:
    return json.dumps({"version": 1, "rows": 2, "origin": ORIGIN, "shards": {}, **changes})


BROKEN = {
    "empty": "",
    "binary": "\udcff",
    "no mapping": "[]",
    "deep": "[" * 100_000,
    "nothing in it": "{}",
    "another version": manifest_text(version=1),
    "no rows": manifest_text(rows=0),
    "endless rows": '{"version": 1, "rows": 1e999, "origin": {}, "shards": {}}',
    "origin is a word": manifest_text(origin="d"),
    "shards are a list": manifest_text(shards=[1]),
    "a shard is a word": manifest_text(shards={"train-00000.safetensors": "x"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_manifests_are_one_line(name: str, tmp_path: Path) -> None:
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
def test_shards_with_other_columns_or_rows_are_refused(name: str, number: int, tmp_path: Path) -> None:
    """A manifest from elsewhere may have the right hashes of them."""
    manifest = write_shards(tmp_path, 4, 2, {"tokens": torch.zeros(4, 1)})
    assert load_file(manifest.shard_path(number)).keys() == {"tokens"}
    save_file(STRANGE[name], manifest.shard_path(number))
    with pytest.raises(UserError, match=r"train-0000\d\.safetensors is damaged"):
        manifest.open_dataset()
