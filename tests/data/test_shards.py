import json
import logging
import multiprocessing
import os
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image

from tests.data.packing import pack, png, red, shard
from tests.support.processes import run_processes
from vqf.data.shards import Shards
from vqf.data.tar.index import load_index
from vqf.data.tar.patterns import find_shards
from vqf.dataloading.loader import keyed_batches, train_batches
from vqf.dataloading.order import ShuffledBatches
from vqf.distributed import comm
from vqf.errors import UserError

PLAIN = {"crop": "center", "flip": False}


@pytest.fixture
def folder(tmp_path):
    """Three training shards of ten images, one validation shard of five; the red of an image is its number."""
    for i in range(3):
        shard(tmp_path / f"train-{i:03}.tar", range(10 * i, 10 * i + 10), cls=lambda each: f"{each % 4}\n")
    shard(tmp_path / "validation-000.tar", range(200, 205), cls=lambda each: "6")
    return tmp_path


def make(root, size=16, seed=0, **options):
    return Shards(size, seed, root=str(root), **{**PLAIN, **options})


def reds(split, epoch=0):
    return [red(split.item(epoch, i)) for i in range(len(split))]


def worded(action):
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def test_images_and_labels_in_the_order_of_the_shards(folder):
    data = make(folder)
    train, validation = data.split("train"), data.split("validation")
    assert reds(train) == list(range(30))
    assert reds(validation) == list(range(200, 205))
    assert [train.item(0, i).label for i in range(30)] == [i % 4 for i in range(30)]
    assert validation.item(3, 2).label == 6
    assert data.classes == [str(i) for i in range(7)]
    assert train.names[12] == "train-001.tar/0012.png"
    assert make(folder, labels=False).split("train").item(0, 0).label is None
    assert sorted(each.name for each in folder.glob("*.idx"))[0] == "train-000.tar.idx"


def test_webdataset_reads_the_same(folder):
    import webdataset

    ours = make(folder).split("train")
    urls = str(folder / "train-{000..002}.tar")
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
    assert [each["__key__"] for each in theirs] == [name.split("/")[1][:-4] for name in ours.names]
    assert [each["cls"] for each in theirs] == ours.labels.tolist()
    for i in (0, 17, 29):
        assert theirs[i]["png"].tobytes() == ours.file(i).load_image().tobytes()


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (5, 1)])
def test_any_number_of_ranks_and_workers_sees_the_same(folder, ranks, workers):
    split = make(folder, crop="random", flip=True).split("train")
    expected = list(train_batches(split, ShuffledBatches(30, 10, 0), start=0, steps=7, workers=0))
    parts = [
        list(train_batches(split, ShuffledBatches(30, 10, 0, rank, ranks), start=2, steps=7, workers=workers))
        for rank in range(ranks)
    ]
    for step in range(2, 7):
        together = torch.cat([part[step - 2].images for part in parts])
        assert torch.equal(together, expected[step].images)
    assert len({tuple(each.labels.tolist()) for each in expected}) == 7


def seen(root):
    """The reds that this process of a run trains on, step by step."""
    split = make(root, train="train-{00..19}.tar", crop="random", flip=True).split("train")
    order = ShuffledBatches(240, 24, 3, comm.rank(), comm.world_size())
    found = train_batches(split, order, start=0, steps=20, workers=3, sync_every=7)
    return [[round(float(image[0].mean() + 1) * 127.5) for image in batch.images] for batch in found]


def test_twenty_shards_over_two_ranks_and_three_workers_show_every_image_once_in_an_epoch(tmp_path):
    """In separate processes that start at once, so that both build the indices."""
    for i in range(20):
        shard(tmp_path / f"train-{i:02}.tar", range(12 * i, 12 * i + 12), cls=lambda each: "0")
    parts = run_processes(2, seen, tmp_path, may_fork=True)
    assert [[len(step) for step in part] for part in parts] == [[12] * 20] * 2
    steps = [parts[0][step] + parts[1][step] for step in range(20)]
    for epoch in range(2):
        assert Counter(red for step in steps[10 * epoch : 10 * epoch + 10] for red in step) == Counter(range(240))
    assert steps[:10] != steps[10:]


def test_a_process_that_is_spawned_reads_too(folder):
    split = make(folder).split("train")
    split.item(0, 0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert [red(each) for each in pool.starmap(split.item, [(0, 3), (0, 25)])] == [3, 25]


def test_labels_from_json(tmp_path):
    shard(tmp_path / "train-0.tar", range(6), json=lambda each: json.dumps({"kind": ["cow", "ant", "bee"][each % 3]}))
    data = make(tmp_path, label_key="kind")
    assert data.classes == ["ant", "bee", "cow"]
    assert data.split("train").labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert make(tmp_path).classes == []
    message = worded(lambda: make(tmp_path, label_key="sort"))
    assert message == "data.label_key=sort: no such field in the .json beside 'train-0.tar/0000.png'"
    shard(tmp_path / "train-0.tar", range(6), json=lambda each: json.dumps({"kind": each * 2}))
    assert make(tmp_path, label_key="kind").classes == [str(i) for i in range(11)]


@pytest.mark.parametrize("label", ["[]", "null", "true", "-1", "1e99", '""', "99999999", '{"a": 1}'])
def test_labels_that_are_none(tmp_path, label):
    shard(tmp_path / "train-0.tar", range(2), json=lambda each: f'{{"kind": {label}}}')
    assert "data.root: the label beside 'train-0.tar/0000.png' is " in worded(lambda: make(tmp_path, label_key="kind"))


def test_an_image_without_label_means_no_labels(tmp_path, caplog):
    pack(tmp_path / "train-0.tar", [("a.cls", b"1"), ("a.png", png()), ("b.png", png())])
    assert make(tmp_path).classes == []
    assert "no labels, because 'train-0.tar/b.png' has no .cls beside it" in caplog.text


def test_names_of_classes_from_the_manifest(folder):
    (folder / "manifest.json").write_text(json.dumps({"classes": list("abcdefgh")}))
    assert make(folder).classes == list("abcdefgh")
    (folder / "manifest.json").write_text(json.dumps({"classes": ["too few"]}))
    assert make(folder).classes == [str(i) for i in range(7)]
    (folder / "manifest.json").write_text("[")
    assert make(folder).classes == [str(i) for i in range(7)]


def manifest(root, counts, **facts):
    listed = [{"name": name, "images": count} for name, count in counts.items()]
    (root / "manifest.json").write_text(json.dumps({"shards": listed, **facts}))


def test_a_shard_that_the_manifest_lists_and_that_is_missing_keeps_its_places(folder, caplog):
    manifest(folder, {f"train-{i:03}.tar": 10 for i in range(4)} | {"validation-000.tar": 5})
    split = make(folder, max_unreadable=0.3).split("train")
    assert reds(split) == [*range(30), *[0] * 10]
    assert split.item(0, 35).label == 0
    assert (
        f"data.root: 10 of the 40 train images in manifest.json of '{folder}' are missing: "
        "10 in 'train-003.tar'; the next images take their places"
    ) in caplog.text
    assert "cannot read 'train-003.tar/missing-0' (missing in its shard)" in caplog.text
    assert make(folder, max_unreadable=0.3).classes == [str(i) for i in range(7)]
    for pattern in ("train-*.tar", "train-{000..003}.tar"):
        assert worded(lambda pattern=pattern: make(folder, train=pattern, max_unreadable=0.2)) == (
            f"data.max_unreadable=0.2: 10 of the 40 train images in manifest.json of '{folder}' are missing: "
            "10 in 'train-003.tar'"
        )
    assert len(make(folder, train="train-00{0,2}.tar", max_unreadable=0).split("train")) == 20


def test_a_shard_with_fewer_images_than_the_manifest_says(folder, caplog):
    manifest(folder, {"train-000.tar": 10, "train-001.tar": 12, "train-002.tar": 9}, finished=False)
    split = make(folder, max_unreadable=0.2).split("train")
    assert reds(split) == [*range(20), 20, 20, *range(20, 30)]
    assert "2 of the 32 train images" in caplog.text and "2 in 'train-001.tar'" in caplog.text
    assert f"manifest.json in '{folder}' lists 9 images, not 10, of the shard 'train-002.tar'" in caplog.text
    assert f"manifest.json in '{folder}' does not list the shard 'validation-000.tar'" in caplog.text
    assert f"manifest.json in '{folder}' says that pipeline=shard has not finished writing it" in caplog.text


def test_a_manifest_of_anything_else_says_nothing(folder):
    for content in ('{"shards": 3}', '{"shards": [1, {"name": "../x.tar", "images": 3}]}', "[1]", "{", "3"):
        (folder / "manifest.json").write_text(content)
        assert reds(make(folder, max_unreadable=0).split("train")) == list(range(30))


def test_which_member_is_the_image(tmp_path):
    members = [("a.left.png", png((1, 0, 0))), ("a.right.png", png((2, 0, 0))), ("a.txt", b"x"), ("only.txt", b"y")]
    pack(tmp_path / "train-0.tar", members)
    assert reds(make(tmp_path).split("train")) == [1]
    assert reds(make(tmp_path, image=".Right.PNG").split("train")) == [2]
    assert "no images in shards of" in worded(lambda: make(tmp_path, image="jpg"))


def test_patterns(folder):
    assert reds(make(folder, train="train-{001..002}.tar").split("train")) == list(range(10, 30))
    assert reds(make(folder, train="train-002.tar::train-00{0,2}.tar").split("train")) == [*range(20, 30), *range(10)]
    assert find_shards(folder, "train-*.tar", "x") == [folder / f"train-{i:03}.tar" for i in range(3)]
    only = make(folder, train=None)
    assert len(only.split("validation")) == 5
    assert worded(lambda: only.split("train")) == f"data.train=None: no images in matching shards of '{folder}'"
    assert worded(lambda: make(folder, train="train-{0..")) == (
        "data.train=train-{0..: unbalanced braces: 'train-{0..'; write it as in train-{0000..0146}.tar"
    )
    assert worded(lambda: make(folder, train="train-{002..003}.tar")) == (
        f"data.root: no shard '{folder / 'train-003.tar'}' (no such file or directory)"
    )


def test_broken_images_follow_the_rule_of_folders(tmp_path, caplog):
    members = [(f"{i:02}.png", png((i, 0, 0))) for i in range(40)]
    members[3] = ("03.png", b"broken")
    path = pack(tmp_path / "train-0.tar", members)
    split = make(tmp_path, max_unreadable=0.05).split("train")
    with path.open("r+b") as file:
        file.seek(load_index(path).members[4].offset + 20)
        file.write(b"!")
    with caplog.at_level(logging.WARNING, "vqf"):
        assert [red(split.item(0, i)) for i in (2, 3, 4, 5, 3)] == [2, 5, 5, 5, 5]
    assert [each.getMessage() for each in caplog.records] == [
        "data.root: cannot read 'train-0.tar/03.png' (not an image of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, "
        "TIFF)); the next image takes its place",
        "data.root: cannot read 'train-0.tar/04.png' (its checksum is not the one in train-0.tar.idx); "
        "the next image takes its place",
    ]
    split.locations[9, 2] += 1
    assert worded(lambda: split.item(0, 9)).startswith(
        f"data.max_unreadable=0.05: 3 of the 40 train images in '{tmp_path}' cannot be read; "
        "the last is 'train-0.tar/09.png'"
    )


def test_a_shard_that_vanishes_or_shrinks_keeps_every_place(folder, caplog):
    before = make(folder, max_unreadable=0.5).split("train")
    whole = load_index(folder / "train-001.tar")
    (folder / "train-000.tar").unlink()
    last = [each for each in whole.members if each.extension == "png"][-1]
    os.truncate(folder / "train-001.tar", last.offset + 9)
    after = make(folder, max_unreadable=0.5).split("train")
    assert list(after.names) == list(before.names)
    assert after.fingerprint == before.fingerprint
    assert "is missing; its 20 members count as unreadable" in caplog.text
    expected = [10] * 11 + [*range(11, 19), 20, *range(20, 30)]
    assert reds(after) == expected
    assert "cannot read 'train-001.tar/0019.png' (train-001.tar is truncated)" in caplog.text
    assert int(after.read_errors.flags.sum()) == 11
    loaded = torch.cat([each.images for each in keyed_batches(after, [[(0, i)] for i in range(30)], workers=2)])
    assert [red(type("S", (), {"image": each})) for each in loaded] == expected


def test_a_lost_label_counts_as_an_unreadable_image(tmp_path, caplog):
    path = shard(tmp_path / "train-0.tar", range(4), json=lambda each: json.dumps({"kind": f"class{each}"}))
    member = next(each for each in load_index(path).members if each.key == "0002" and each.extension == "json")
    before = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(member.offset + 11)
        file.write(b"X")
    os.utime(path, ns=(before, before))
    data = make(tmp_path, label_key="kind")
    split = data.split("train")
    assert data.classes == ["class0", "class1", "class3"]
    assert (red(split.item(0, 2)), split.item(0, 2).label) == (3, 2)
    assert "cannot read 'train-0.tar/0002.png' (its label cannot be read)" in caplog.text


def test_a_shard_that_was_truncated_before_it_was_indexed(folder, caplog):
    path = folder / "train-001.tar"
    last = [each for each in load_index(path).members if each.extension == "png"][4]
    (folder / "train-001.tar.idx").unlink()
    os.truncate(path, last.offset + 9)
    for _ in range(2):  # without an index, and with one
        caplog.clear()
        assert reds(make(folder).split("train")) == [*range(10), *range(10, 14), *range(20, 30)]
        assert f"the shard '{path}' is truncated or damaged; only its intact samples are used" in caplog.text
    assert worded(lambda: make(folder, max_unreadable=0)) == (
        f"data.max_unreadable=0: 1 of 3 shards are truncated or damaged; the last is '{path}'"
    )


def test_a_folder_that_cannot_be_written(folder, monkeypatch, tmp_path_factory):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", refused)
        assert reds(make(folder).split("train")) == list(range(30))
    assert not list(folder.glob("*.idx")) and not list(folder.glob(".*"))
    cache = tmp_path_factory.mktemp("cache")
    assert reds(make(folder, index=str(cache)).split("train")) == list(range(30))
    assert len(list(cache.iterdir())) == 4
    assert not list(folder.glob("*.idx"))


def test_the_fingerprint_follows_images_and_labels_but_not_the_path(folder, tmp_path_factory):
    def fingerprint(root=folder, part="train", size=16, **options):
        return make(root, size, **options).split(part).fingerprint

    before = fingerprint()
    copy = tmp_path_factory.mktemp("copy") / "shards"
    shutil.copytree(folder, copy)
    os.utime(copy / "train-000.tar", (1, 1))
    assert fingerprint(copy) == before
    different = [before, fingerprint(part="validation"), fingerprint(size=8), fingerprint(crop="random")]
    different += [fingerprint(train="train-{002,001,000}.tar"), fingerprint(labels=False)]
    shard(copy / "train-000.tar", range(10), cls=lambda each: "1")
    different.append(fingerprint(copy))
    shard(copy / "train-000.tar", [0, 1, 2, 3, 4, 5, 6, 7, 8, 99], cls=lambda each: f"{each % 4}\n")
    different.append(fingerprint(copy))
    assert len(set(different)) == len(different)


def test_the_number_of_classes_may_be_given(folder):
    assert make(folder, classes=9).classes == [str(i) for i in range(9)]
    message = "data.classes=6: the label 6 is not a number below 6"
    assert worded(lambda: make(folder, classes=6)) == message


def test_random_crops_follow_the_key_alone(tmp_path):
    ramp = Image.linear_gradient("L").resize((64, 16)).convert("RGB")
    file = tmp_path / "ramp.png"
    Image.composite(ramp, ramp.rotate(180), ramp.convert("1")).save(file)
    pack(tmp_path / "train-0.tar", [(f"{i}.png", file.read_bytes()) for i in range(4)])
    first, second = (make(tmp_path, crop="random", flip=True).split("train") for _ in range(2))
    assert torch.equal(first.item(3, 1).image, second.item(3, 1).image)


def test_mistakes_are_worded(folder):
    assert worded(lambda: make("nowhere")) == (
        "data.root: no folder 'nowhere'; point data.root to a folder of tar shards"
    )
    assert worded(lambda: make(folder, train="a-*.tar", validation=None)) == (
        f"data.root: no images in shards of '{folder}'; data.train=a-*.tar and data.validation=None"
    )
    assert worded(lambda: make(folder).split("test")) == "unknown split 'test'. Known: train, validation."
    pack(folder / "train-000.tar", [("a.png", png()), ("a.png", png())])
    assert worded(lambda: make(folder)) == f"data.root: the shard '{folder / 'train-000.tar'}' holds 'a.png' twice"
