"""Streamed shards, each copied to one shard, byte by byte or in another format."""

import io
import json
import shutil

import pytest
from PIL import Image

from tests.data.packing import pack, png, red, shard
from tests.data.test_shard_pairs import COUNT
from tests.data.test_shard_pairs import written as packed_pairs
from tests.pipelines.shards.sharding import files, written
from tests.support.composing import compose
from vqf.data.tar import remote_io
from vqf.errors import UserError
from vqf.pipelines.shards.writer import ShardWriter
from vqf.registry import build

SHARDS, EACH = 5, 4


@pytest.fixture
def folder(tmp_path):
    """Five training shards and one validation shard; the red of image i is i, its label i % 3."""
    for i in range(SHARDS):
        shard(tmp_path / "far" / f"a-{i}.tar", range(EACH * i, EACH * i + EACH), cls=lambda each: f"{each % 3}")
    shard(tmp_path / "far" / "v.tar", range(200, 203), cls=lambda each: "2")
    return tmp_path / "far"


def configured(folder, *words, workers=0):
    given = [f"data.root=file:{folder}", "data.train='a-{0..4}.tar'", "data.train_images=20", "data.classes=3"]
    given += ["data.validation=v.tar", "data.validation_images=3", "image_size=16", f"workers={workers}"]
    return compose("data=shards", *given, *words)


def read(to, part="train", **options):
    node = {"name": "shards", "root": str(to), "flip": False, "crop": "center", **options}
    return build("data", node, image_size=16, seed=0).split(part)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_shard_becomes_one_byte_by_byte(folder, tmp_path, workers, caplog):
    manifest = written(configured(folder, workers=workers), tmp_path / "near", shard_size=3)
    assert manifest["finished"] and manifest["images"] == {"train": 20, "validation": 3}
    assert [(each["name"], each["images"]) for each in manifest["shards"]] == [
        *((f"train-{i:06}.tar", 4) for i in range(SHARDS)),
        ("validation-000000.tar", 3),
    ]
    for part, numbers in (("train", range(20)), ("validation", range(200, 203))):
        split = read(tmp_path / "near", part)
        assert [red(split.item(0, i)) for i in range(len(split))] == list(numbers)
        assert [split.file(i).read_bytes() for i in range(len(split))] == [png((each, 0, 0)) for each in numbers]
        assert split.labels.tolist() == [2] * 3 if part == "validation" else [each % 3 for each in numbers]
    assert not [each for each in caplog.records if each.levelname == "WARNING"]
    written(configured(folder, workers=2 - workers), tmp_path / "again", shard_size=3)
    assert files(tmp_path / "near") == files(tmp_path / "again")


def test_full_images_are_scaled_instead_of_training_crops(folder, tmp_path):
    for i in range(SHARDS):
        members = [(f"{j}.png", png((EACH * i + j, 0, 0), (100, 60))) for j in range(EACH)]
        pack(folder / f"a-{i}.tar", members)
    config = configured(folder, "data.labels=false")
    written(config, tmp_path / "near", format="webp", size=30)
    split = read(tmp_path / "near")
    assert [split.file(i).load_image().size for i in range(20)] == [(50, 30)] * 20
    assert Image.open(io.BytesIO(split.file(3).read_bytes())).format == "WEBP"


def test_a_broken_image_is_skipped_and_not_replaced(folder, tmp_path):
    content = [b"broken" if i == 1 else png((i, 0, 0)) for i in range(EACH)]
    pack(folder / "a-0.tar", [each for i in range(EACH) for each in ((f"{i}.png", content[i]), (f"{i}.cls", b"0"))])
    manifest = written(configured(folder), tmp_path / "near")
    assert [each["name"] for each in manifest["shards"][0]["skipped"]] == ["a-0.tar/1.png"]
    split = read(tmp_path / "near")
    assert [red(split.item(0, i)) for i in range(19)] == [0, *range(2, 20)]


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_an_incomplete_shard_is_fetched_again(folder, tmp_path, caplog, damage):
    """Its readable images are kept, and it counts as incomplete until all can be read."""
    whole, path = tmp_path / "whole", folder / "a-1.tar"
    shutil.copytree(folder, whole)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: 2 * 4 * 512 + 700])
    else:
        path.unlink()
    to, had = tmp_path / "near", 2 if damage == "cut" else 0
    manifest = written(configured(folder), to)
    assert manifest["shards"][1]["images"] == had
    reason = manifest["shards"][1]["broken"]
    assert ("unexpected end of data" if damage == "cut" else "no such file or directory") in reason
    assert (
        f"'train-000001.tar' is incomplete: cannot read all of 'file:{path}' ({reason}); the same command"
        in caplog.text
    )
    assert str(tmp_path) not in (to / "manifest.json").read_text()
    assert f"data.train_images=20: its shards hold {16 + had}" in caplog.text
    expected = [*range(4), *range(4, 4 + had), *range(8, 20)]
    assert [red(read(to).item(0, i)) for i in range(16 + had)] == expected
    shutil.copy(whole / "a-1.tar", path)
    times = {each.name: each.stat().st_mtime_ns for each in to.glob("*.tar")}
    assert written(configured(folder), to)["images"]["train"] == 20
    changed = [each.name for each in to.glob("*.tar") if each.stat().st_mtime_ns != times[each.name]]
    assert changed == ["train-000001.tar"]


def test_an_incomplete_shard_is_not_replaced_by_a_shorter_one(folder, tmp_path):
    path, to = folder / "a-1.tar", tmp_path / "near"
    whole = path.read_bytes()
    path.write_bytes(whole[: 2 * 4 * 512 + 700])
    first = written(configured(folder), to)
    before = files(to)
    path.unlink()
    assert written(configured(folder), to) == first
    assert files(to) == before
    path.write_bytes(whole[: 3 * 4 * 512 + 700])
    assert written(configured(folder), to)["shards"][1]["images"] == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_complete_after_a_server_outage(folder, tmp_path, workers):
    """Whatever exceeded the limit is fetched again before the limit is checked in the next run."""
    away = shutil.copytree(folder, tmp_path / "away")
    for i in (1, 2, 3):
        (folder / f"a-{i}.tar").unlink()
    pack(folder / "a-4.tar", [each for i in range(16, 20) for each in ((f"{i}.png", b"broken"), (f"{i}.cls", b"0"))])
    with pytest.raises(UserError, match=r"^data\.max_unreadable: \d of the "):
        written(configured(folder, workers=workers), tmp_path / "near")
    shutil.copytree(away, folder, dirs_exist_ok=True)
    manifest = written(configured(folder, workers=workers), tmp_path / "near")
    assert manifest["finished"] and manifest["images"]["train"] == 20
    written(configured(folder), tmp_path / "whole")
    assert files(tmp_path / "near") == files(tmp_path / "whole")


def test_skipped_images_within_the_limit_do_not_refetch_their_shard(folder, tmp_path, monkeypatch):
    pack(
        folder / "a-0.tar", [each for i in range(4) for each in ((f"{i}.png", png() if i else b""), (f"{i}.cls", b"0"))]
    )
    manifest = written(configured(folder), tmp_path / "near")
    monkeypatch.setattr(remote_io, "iter_samples", lambda url, roles: pytest.fail("fetched"))
    assert written(configured(folder), tmp_path / "near") == manifest


@pytest.mark.parametrize("max_unreadable", [0.01, 1])
def test_a_stream_without_a_readable_image_is_not_finished(folder, tmp_path, max_unreadable):
    config = compose(
        *("data=shards", f"data.root=file:{folder}", "data.train=none.tar", "data.train_images=4", "image_size=16"),
        *("data.validation=null", f"data.max_unreadable={max_unreadable}"),
    )
    with pytest.raises(UserError) as caught:
        written(config, tmp_path / "near")
    assert str(caught.value) == (
        "data.train: none of its images can be read; the last shard is "
        f"'file:{folder}/none.tar' (no such file or directory)"
    )
    assert not json.loads((tmp_path / "near" / "manifest.json").read_text())["finished"]


def test_a_pipe_command_is_not_stored_in_image_names(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(remote_io.ALLOW_PIPES_VARIABLE, "1")
    command = f"data.train='pipe:true PASSWORD && cat {folder}/a-0.tar'"
    config = compose("data=shards", command, "data.train_images=4", "data.validation=null", "image_size=16")
    written(config, tmp_path / "near")
    assert [each["json"] for each in webdataset_of(tmp_path / "near" / "train-000000.tar")] == [
        {"name": f"000{i}.png"} for i in range(4)
    ]
    for path in (tmp_path / "near").iterdir():
        assert b"PASSWORD" not in path.read_bytes() and str(folder).encode() not in path.read_bytes()


def webdataset_of(path):
    import webdataset

    return list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"))


def test_too_many_broken_shards_stop_the_run(folder, tmp_path):
    for i in (1, 3):
        (folder / f"a-{i}.tar").unlink()
    with pytest.raises(UserError) as caught:
        written(configured(folder, "data.max_unreadable=0.3"), tmp_path / "near")
    assert str(caught.value).startswith(
        "data.max_unreadable: 2 of the 5 train shards cannot be read, more than the 1 allowed"
    )
    assert written(configured(folder, "data.max_unreadable=0.4"), tmp_path / "near")["finished"]


def test_a_resumed_run_fetches_missing_shards_only(folder, tmp_path, monkeypatch):
    to = tmp_path / "near"
    written(configured(folder), to)
    before = files(to)
    (to / "train-000002.tar").unlink()
    fetched, opened = [], remote_io.iter_samples
    monkeypatch.setattr(remote_io, "iter_samples", lambda url, roles: fetched.append(url) or opened(url, roles))
    written(configured(folder), to)
    assert fetched == [f"file:{folder}/a-2.tar"]
    assert files(to) == before


def test_an_invalid_label_stops_the_run(folder, tmp_path):
    config = configured(folder, "data.classes=2")
    with pytest.raises(UserError, match=r"the label beside 'a-0.tar/0002.png' is 2, not below 2"):
        written(config, tmp_path / "near")


@pytest.mark.parametrize("how", ["original", "png"])
def test_pairs_of_a_stream(tmp_path, how):
    packed_pairs(tmp_path)
    words = [f"data.root=file:{tmp_path / 'shards'}", "data.train='train-{0..2}.tar'", "data.validation=null"]
    config = compose("data=shard_pairs", *words, f"data.train_images={COUNT}", "data.classes=2", "image_size=16")
    manifest = written(config, tmp_path / "near", format=how)
    assert manifest["maps"] == {"maps": "rgb"}
    node = {"name": "shard_pairs", "validation": None}
    ours, theirs = (
        build("data", {**node, "root": str(tmp_path / each)}, image_size=16, seed=0).split("train")
        for each in ("near", "shards")
    )
    for i in range(COUNT):
        one, other = ours.item(1, i), theirs.item(1, i)
        assert one.image.equal(other.image) and one.condition.equal(other.condition) and one.label == other.label


def test_an_interrupt_between_shards_leaves_intact_ones(folder, tmp_path, monkeypatch):
    written_whole = ShardWriter.__call__

    def stopping(self, task):
        if task.name == "train-000003.tar":
            raise KeyboardInterrupt
        return written_whole(self, task)

    to = tmp_path / "near"
    monkeypatch.setattr(ShardWriter, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        written(configured(folder), to)
    assert sorted(each.name for each in to.glob("*.tar")) == [f"train-{i:06}.tar" for i in range(3)]
    monkeypatch.undo()
    written(configured(folder), to)
    written(configured(folder), tmp_path / "whole")
    assert files(to) == files(tmp_path / "whole")
