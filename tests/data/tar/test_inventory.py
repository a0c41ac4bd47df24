"""What shards hold beside the images and labels that are read is counted, with the option that decides."""

import io
import json
import logging
import tarfile

import pytest

from tests.data.packing import pack, png, red, shard
from tests.support.composing import compose
from vqf.data.shard_pairs import ShardPairs
from vqf.data.shards import Shards
from vqf.pipelines.check import Check
from vqf.pipelines.shard import Shard

PLAIN = {"crop": "center", "flip": False, "validation": None}


@pytest.fixture(autouse=True)
def log_everything(caplog):
    caplog.set_level(logging.INFO, "vqf")


def dots(folder):
    return pack(folder / "train-0.tar", [(f"v1.{i}.png", png((i * 30, 0, 0))) for i in range(8)])


def depth_first(folder, count=8):
    ends = (("depth.png", 9), ("jpg", 250))
    members = [(f"{i}.{end}", png((value, 0, 0))) for i in range(count) for end, value in ends]
    return pack(folder / "train-0.tar", members)


def make(folder, **options):
    return Shards(16, 0, root=str(folder), **{**PLAIN, **options})


def reds(split):
    return [red(split.item(0, i)) for i in range(len(split))]


def test_eight_images_of_one_sample_are_mentioned_and_an_option_reads_all(tmp_path, caplog):
    dots(tmp_path)
    assert reds(make(tmp_path).split("train")) == [0]
    assert (
        "data.image: 7 images in the train shards are left out, because another one of the same sample is read: "
        ".1.png 1, .2.png 1, .3.png 1, .4.png 1, .5.png 1, .6.png 1, .7.png 1 beside .0.png 1; data.image=EXTENSION "
        "reads another one, data.key=last_dot makes each a sample of its own"
    ) in caplog.text
    caplog.clear()
    split = make(tmp_path, key="last_dot").split("train")
    assert (reds(split), split.names[1]) == ([i * 30 for i in range(8)], "train-0.tar/v1.1.png")
    assert not caplog.records


def test_an_extension_of_one_word_is_the_image_whatever_comes_first(tmp_path, caplog):
    depth_first(tmp_path)
    assert set(reds(make(tmp_path).split("train"))) == {250}
    assert "8 images in the train shards are left out" in caplog.text and ".depth.png 8 beside .jpg 8" in caplog.text
    assert set(reds(make(tmp_path, image="depth.png").split("train"))) == {9}
    caplog.clear()
    pairs = ShardPairs(16, 0, root=str(tmp_path), condition="depth", **PLAIN).split("train")
    assert red(pairs.item(0, 0)) == 250 and not caplog.records


def test_labels_and_captions_of_other_names_are_mentioned_with_the_fields_of_json(tmp_path, caplog):
    content = json.dumps({"class": 3, "caption": "a cat"}).encode()
    sample = {"png": png(), "txt": b"a", "json": content}
    members = [(f"{i}.{end}", data) for i in range(4) for end, data in sample.items()]
    pack(tmp_path / "train-0.tar", members)
    assert make(tmp_path).classes == []
    assert (
        "data.label_key: not read in the train shards: .txt 4, .json 4 (fields caption, class); labels are in .cls, or "
        "in the field of .json that data.label_key names"
    ) in caplog.text
    caplog.clear()
    assert make(tmp_path, label_key="caption").classes == ["a cat"]
    assert "not read in the train shards: .txt 4; labels" in caplog.text


def test_samples_without_an_image_are_counted(tmp_path, caplog):
    members = [("a.png", png()), ("b.avif", b"x"), ("b.txt", b"x"), ("c.avif", b"x"), ("d.jfif", png())]
    pack(tmp_path / "train-0.tar", members)
    assert len(make(tmp_path).split("train")) == 2
    assert (
        "data.image: 2 of the 4 samples in the train shards have no image and are left out, such as 'train-0.tar/b'; "
        "they have .avif 2, .txt 1"
    ) in caplog.text
    make(tmp_path, image="png")
    assert "3 of the 4 samples in the train shards have no .png and are left out" in caplog.text


def test_members_that_belong_to_no_sample_are_counted_also_from_the_index(tmp_path, caplog):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, kind in (
            ("a.png", tarfile.REGTYPE),
            ("b.png", tarfile.LNKTYPE),
            ("c.png", tarfile.SYMTYPE),
            ("d.png", tarfile.FIFOTYPE),
            ("._a.png", tarfile.REGTYPE),
            ("README", tarfile.REGTYPE),
            ("folder", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png" if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
            content = png() if kind == tarfile.REGTYPE else b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    line = (
        "data.root: members of no sample in the train shards are left out: links 2, devices and pipes 1, hidden 1, "
        "without an ending 1"
    )
    for _ in range(2):
        caplog.clear()
        assert len(make(tmp_path).split("train")) == 1
        assert line in caplog.text


def test_an_index_without_these_counts_is_still_used(tmp_path, caplog):
    shard(tmp_path / "train-0.tar", range(3))
    make(tmp_path)
    path = tmp_path / "train-0.tar.idx"
    content = json.loads(path.read_text())
    del content["left_out"]
    path.write_text(json.dumps(content))
    before = path.stat().st_mtime_ns
    assert len(make(tmp_path).split("train")) == 3
    assert path.stat().st_mtime_ns == before
    path.write_text(json.dumps({**content, "left_out": {"links": "many"}}))
    assert len(make(tmp_path).split("train")) == 3
    assert json.loads(path.read_text())["left_out"] == {}


def test_shards_that_no_pattern_names_and_shards_of_both_splits(tmp_path, caplog):
    for name in ("train-0.tar", "validation-0.tar", "val-0.tar", "train-1.tar.gz"):
        shard(tmp_path / name, range(2))
    Shards(16, 0, root=str(tmp_path))
    assert (
        f"data.root: 2 of the 4 tar files in '{tmp_path}' are left out by data.train=train-*.tar and "
        "data.validation=validation-*.tar, such as 'train-1.tar.gz'"
    ) in caplog.text
    Shards(16, 0, root=str(tmp_path), validation="*-0.tar")
    assert "data.validation: 1 of its shards are trained on too, such as 'train-0.tar'" in caplog.text


def test_own_shards_lose_nothing(tmp_path, caplog):
    for i in range(6):
        path = tmp_path / "p" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((i, 0, 0)))
    config = compose("data=folder", f"data.root={tmp_path / 'p'}", "data.validation_last=2", "image_size=16")
    Shard(config, tmp_path, out=str(tmp_path / "shards")).run()
    caplog.clear()
    assert Shards(16, 0, root=str(tmp_path / "shards")).classes == ["a", "b"]
    assert not caplog.records


def test_check_writes_the_lines_of_the_start(tmp_path):
    depth_first(tmp_path / "shards", 2)
    config = compose("data=shards", f"data.root={tmp_path / 'shards'}", "data.validation=null", "image_size=16")
    Check(config, tmp_path / "run").run()
    messages = json.loads((tmp_path / "run" / "check.json").read_text())["messages"]
    assert [line for line in messages if ".depth.png 2 beside .jpg 2" in line]


def test_a_stream_mentions_the_first_loss_of_each_kind_once(tmp_path, caplog):
    members = [(f"{i}.{end}", png((9, 0, 0))) for i in range(3) for end in ("depth.png", "jpg", "txt", "json")]
    pack(tmp_path / "train-0.tar", [("0a.avif", b"x"), ("0b.avif", b"x"), *members])
    options = {**PLAIN, "root": f"file:{tmp_path}", "train": "train-0.tar", "train_images": 3}
    split = Shards(16, 0, **options).split("train")
    for i in (0, 1, 2, 0):
        split.item(0, i)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.partition(", as perhaps")[0] for line in lines] == [
        "data.image: 'train-0.tar/0a' has no image and is left out; it has .avif",
        "data.image: 'train-0.tar/0': .jpg is read and .depth.png left out",
        "data.label_key: 'train-0.tar/0': .txt, .json not read",
    ]
    last = Shards(16, 0, key="last_dot", **options).split("train")
    assert last.fingerprint != split.fingerprint
    assert [raw.name for raw in last._raw_samples([0])][:2] == ["train-0.tar/0.depth.png", "train-0.tar/0.jpg"]
