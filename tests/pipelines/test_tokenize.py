"""Token shards: equal for any number of processes, resumable, and never written twice."""

import hashlib
import json
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from tests.support.composing import compose
from tests.support.layouts import raster
from tests.support.processes import PATIENCE, run_processes
from tests.training.test_trainer import TINY, weights
from vqf.batch import Batch, Sample
from vqf.dataloading import encode
from vqf.dataloading.encode import TokenEncoder, check_image_size, tokenize_split
from vqf.dataloading.token_shards import TokenDataset, TokenShardManifest
from vqf.distributed.engine import Engine
from vqf.errors import UserError
from vqf.models.conditioning import ConditionerStack
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.pipelines.tokenize import Tokenize
from vqf.registry import build

IMAGES, VIEWS = 23, 3


class KilledError(Exception):
    """Stands for the end of a process."""


class Images:
    """Constant images that encode view and index; each with a label, a condition map and a crop box."""

    fingerprint = "numbers"

    def __init__(self, count: int = IMAGES) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def item(self, epoch: int, index: int) -> Sample:
        image = torch.full((3, 4, 4), (epoch * 10 + index) / 1000)
        return Sample(image, label=index % 5, condition=-image, crop_box=torch.tensor([0.0, 0.0, index / 100, 1.0]))


class Numbers(nn.Module):
    """A tokenizer whose tokens are the constant of an image; it counts images, and raises after `most`."""

    layout = raster((4, 4), 1000, stride=1)

    def __init__(self, most: int = 10**9) -> None:
        super().__init__()
        self.seen, self.most = 0, most

    def encode_tokens(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        if self.seen > self.most:
            raise KilledError
        return (images[:, 0].flatten(1) * 1000).round().long()

    def fingerprint(self) -> str:
        return "numbers"


class Map:
    """A conditioner of maps whose indices are the map's values."""

    vocab_size, length = 1000, 4

    def prepare(self, batch: Batch) -> Batch:
        assert batch.conditions is not None
        indices = (batch.conditions[:, 0, :2, :2] * -1000).round().long()
        return Batch(labels=batch.labels, crop_boxes=batch.crop_boxes, condition_indices={"map": indices})

    def __call__(self, batch: Batch) -> Tensor:
        return batch.condition_indices["map"].flatten(1)


def make_encoder(tokenizer: Numbers | None = None) -> TokenEncoder:
    engine = Engine(torch.device("cpu"), torch.float32)
    return TokenEncoder(tokenizer or Numbers(), ConditionerStack({"map": Map()}), engine)  # type: ignore[arg-type, dict-item]


def config(batch_size: int = 4, workers: int = 0) -> DictConfig:
    loading = {"batch_size": batch_size, "workers": workers, "worker_timeout": 600.0}
    return OmegaConf.create({"tokens": {"augmentations": VIEWS}, **loading})


def make(folder: Path, tokenizer: Numbers | None = None, *, rows: int | None = 10, workers: int = 0) -> TokenDataset:
    return tokenize_split(make_encoder(tokenizer), Images(), "train", folder, config(workers=workers), rows)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def all_columns(tokens: TokenDataset) -> dict[str, Tensor]:
    return {name: torch.cat([shard[name] for shard in tokens.shards]) for name in tokens.shards[0]}


@pytest.mark.parametrize("rows", [1, 10, 23, 69, None])
def test_shards_hold_the_tokens_labels_crop_boxes_and_condition_indices(rows: int | None, tmp_path: Path) -> None:
    tokenizer, split = Numbers(), Images()
    columns = all_columns(make(tmp_path, tokenizer, rows=rows))
    assert tokenizer.seen == IMAGES * VIEWS
    samples = [split.item(view, index) for view in range(VIEWS) for index in range(IMAGES)]
    numbers = torch.tensor([view * 10 + index for view in range(VIEWS) for index in range(IMAGES)])
    assert torch.equal(columns["tokens"], numbers[:, None].expand(-1, 16).int())
    assert torch.equal(columns["condition_indices.map"], numbers[:, None, None].expand(-1, 2, 2).int())
    assert columns["labels"].tolist() == [sample.label for sample in samples]
    assert torch.equal(
        columns["crop_boxes"], torch.stack([sample.crop_box for sample in samples if sample.crop_box is not None])
    )


def test_the_manifest_lists_the_shards(tmp_path: Path) -> None:
    make(tmp_path)
    manifest = json.loads((tmp_path / "train.json").read_text())
    names = [f"train-{number:05d}.safetensors" for number in range(7)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "train.json"]
    assert {name: each["rows"] for name, each in manifest["shards"].items()} == dict.fromkeys(names, 10) | {names[6]: 9}
    for name, each in manifest["shards"].items():
        assert each["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    origin = {"tokenizer": "numbers", "data": "numbers", "views": "3", **manifest["origin"]}
    assert manifest["origin"] == origin and origin.keys() == {"tokenizer", "data", "views", "conditions"}
    assert (manifest["images"], manifest["rows"], manifest["finished"]) == (IMAGES, 10, True)


def test_workers_change_nothing(tmp_path: Path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "two", workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def make_on_a_rank(folder: str) -> int:
    tokenizer = Numbers()
    make(Path(folder), tokenizer)
    return tokenizer.seen


def test_two_processes_write_the_shards_of_one(tmp_path: Path) -> None:
    """Rank 0 writes shards 0, 2, 4 and 6, rank 1 the others; both open all of them."""
    make(tmp_path / "one")
    assert run_processes(2, make_on_a_rank, str(tmp_path / "two")) == [39, 30]
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for number in (1, 5):
        (tmp_path / "two" / f"train-{number:05d}.safetensors").unlink()
    assert run_processes(2, make_on_a_rank, str(tmp_path / "two")) == [10, 10]
    assert files(tmp_path / "one") == files(tmp_path / "two")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "gone": Path.unlink,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "a bit flipped": flip_bit,
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_only_damaged_shards_are_written_again(name: str, tmp_path: Path) -> None:
    make(tmp_path)
    before = files(tmp_path)
    for number, rows in ((2, 10), (6, 9)):
        DAMAGES[name](tmp_path / f"train-{number:05d}.safetensors")
        tokenizer = Numbers()
        found = make(tmp_path, tokenizer, rows=None)
        assert tokenizer.seen == rows and files(tmp_path) == before
        assert found.shards[number]["tokens"][0, 0] == number * 10 // IMAGES * 10 + number * 10 % IMAGES


def test_intact_shards_are_not_touched(tmp_path: Path) -> None:
    make(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.iterdir())}
    make(tmp_path, tokenizer := Numbers())
    assert tokenizer.seen == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("seen", [0, 9, 10, 35, 68])
def test_a_killed_run_loses_only_the_current_shard(seen: int, tmp_path: Path) -> None:
    make(tmp_path / "whole")
    with pytest.raises(KilledError):
        make(tmp_path / "cut", Numbers(most=seen))
    assert not json.loads((tmp_path / "cut" / "train.json").read_text())["finished"]
    make(tmp_path / "cut", tokenizer := Numbers())
    assert tokenizer.seen == IMAGES * VIEWS - seen // 10 * 10
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


class Deadly(Numbers):
    """A tokenizer that kills its process at the 36th image."""

    def encode_tokens(self, images: Tensor) -> Tensor:
        if self.seen + len(images) > 35:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_tokens(images)


def make_and_die(folder: str) -> None:
    make(Path(folder), Deadly())


def test_a_process_killed_with_sigkill_leaves_intact_shards(tmp_path: Path) -> None:
    make(tmp_path / "whole")
    process = multiprocessing.get_context("forkserver").Process(target=make_and_die, args=(str(tmp_path / "cut"),))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert cut.keys() == {"train.json", *(f"train-0000{number}.safetensors" for number in range(3))}
    assert all(cut[name] == whole[name] for name in cut if name != "train.json")
    make(tmp_path / "cut", tokenizer := Numbers())
    assert tokenizer.seen == IMAGES * VIEWS - 30
    assert files(tmp_path / "cut") == whole


@pytest.mark.parametrize("method_name", ["write", "add"])
def test_killed_while_a_shard_is_written_or_recorded(
    method_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "whole")
    method, calls = getattr(TokenShardManifest, method_name), []

    def dies(self: TokenShardManifest, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:  # only once
            (self.folder / ".train-00003.safetensors.4711.tmp").write_bytes(b"half")
            raise KilledError
        return method(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(TokenShardManifest, method_name, dies)
        with pytest.raises(KilledError):
            make(tmp_path / "cut")
    make(tmp_path / "cut", tokenizer := Numbers())
    done = 3 if method_name == "write" else 2  # the first call of `add` records an empty manifest
    assert tokenizer.seen == IMAGES * VIEWS - done * 10
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_at_most_one_shard_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1000 images in shards of 20 rows never more than 20 are alive, and keys are read no further ahead."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    call = TokenEncoder.__call__

    def watched(self: TokenEncoder, batch: Batch) -> dict[str, Tensor]:
        nonlocal most
        found = call(self, batch)
        alive[:] = [each for each in alive if each() is not None] + [weakref.ref(found["tokens"])]
        most = max(most, sum(len(each()) for each in alive))  # type: ignore[arg-type]
        return found

    keys: list[int] = []
    item = Images.item

    def counted(self: Images, epoch: int, index: int) -> Sample:
        keys.append(index)
        return item(self, epoch, index)

    class Slow(Numbers):
        def encode_tokens(self, images: Tensor) -> Tensor:
            assert len(keys) - self.seen <= 2 * len(images), "images are read ahead of what is encoded"
            return super().encode_tokens(images)

    monkeypatch.setattr(TokenEncoder, "__call__", watched)
    monkeypatch.setattr(Images, "item", counted)
    found = tokenize_split(make_encoder(Slow()), Images(1000), "validation", tmp_path, config(5), 20)
    assert len(found.shards) == 50 and len(keys) == 1000
    assert most == 20


def test_conditioners_without_cached_indices_share_tokens() -> None:
    """Labels and crop boxes are cached in any case; only conditioners with cached indices matter."""

    def fingerprint(*names: str) -> str:
        conditioners = {
            name: build("conditioner", {"name": name}, num_classes=5, layout=raster((2, 2), 8), tokenizer=None)
            for name in names
        }
        return encode._fingerprint(ConditionerStack(conditioners))

    assert fingerprint("none") == fingerprint("label") == fingerprint("label", "none")
    assert fingerprint("none") != encode._fingerprint(ConditionerStack({"map": Map()}))  # type: ignore[dict-item]
    longer = Map()
    longer.length = 8  # type: ignore[misc]
    fingerprints = {encode._fingerprint(ConditionerStack({"map": each})) for each in (Map(), longer)}  # type: ignore[dict-item]
    assert len(fingerprints) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Stage1(compose(*TINY, "steps=2"), folder).run()
    return folder


def test_stage2_trains_on_shards_of_tokenize_as_on_its_own(run: Path, tmp_path: Path) -> None:
    words = [f"run={run}", "tokens.augmentations=2"]
    root = f"tokens.root={tmp_path / 'tokens'}"
    Tokenize(compose(*TINY, "pipeline=tokenize", root, *words), tmp_path, rows=96).run()
    assert len(list((tmp_path / "tokens").glob("train-*.safetensors"))) == -(-2800 // 96)
    before = files(tmp_path / "tokens")
    Stage2(compose(*TINY, "pipeline=stage2", *words, "steps=4"), tmp_path / "own").run()
    Stage2(compose(*TINY, "pipeline=stage2", *words, "steps=4", root), tmp_path / "shards").run()
    assert weights(tmp_path / "own") == weights(tmp_path / "shards")
    assert not (tmp_path / "shards" / "tokens").exists() and files(tmp_path / "tokens") == before
    assert sorted(path.name for path in (tmp_path / "own" / "tokens").iterdir()) == [
        *("train-00000.safetensors", "train.json", "validation-00000.safetensors", "validation.json")
    ]


def test_size_and_data_are_inherited_from_the_run(run: Path, tmp_path: Path) -> None:
    """Only `run` is given, and shards are written into this run's folder by default."""
    Tokenize(compose("pipeline=tokenize", f"run={run}", "batch_size=100"), tmp_path).run()
    found = json.loads((tmp_path / "tokens" / "validation.json").read_text())
    assert found["images"] == 236 and found["finished"]
    with pytest.raises(UserError, match=r"train\.json was made with views 1, this run has 2"):
        Tokenize(compose("pipeline=tokenize", f"run={run}", "tokens.augmentations=2"), tmp_path).run()


def test_another_size_than_the_tokenizers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SimpleNamespace(image_size=(32, 48))
    monkeypatch.setattr("vqf.dataloading.encode.cli_keys", lambda: ["image_size"])
    check_image_size(OmegaConf.create({"image_size": [32, 48]}), tokenizer)  # type: ignore[arg-type]
    for size, words in ((48, "48"), ([48, 32], "[48,32]")):
        with pytest.raises(UserError) as caught:
            check_image_size(OmegaConf.create({"image_size": size}), tokenizer)  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"image_size={words}: the tokenizer was trained at 32 x 48, and stage 2 uses its size; "
            "leave image_size out, or train a tokenizer at the other size"
        )
    monkeypatch.setattr("vqf.dataloading.encode.cli_keys", list)
    check_image_size(OmegaConf.create({"image_size": 256}), tokenizer)  # type: ignore[arg-type]  # the default
