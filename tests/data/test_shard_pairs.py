"""Pairs in shards against the same pairs in two folders: equal to the bit."""

import itertools
import json
import logging
from collections import Counter

import numpy as np
import pytest
import torch

from tests.data.packing import pack, png
from tests.data.test_pairs import save
from vqf.data.pairs import Pairs
from vqf.data.shard_pairs import ShardPairs
from vqf.data.shards import Shards
from vqf.errors import UserError
from vqf.images import condition_reader
from vqf.registry import build

RNG = np.random.default_rng(7)
COUNT = 9
PLAIN = {"crop": "center", "flip": False}
KINDS = {
    "rgb": {},
    "grey": {"maps": "grey"},
    "palette": {"maps": "palette"},
    "labels": {"maps": "labels", "labels": 5},
    "unlabelled": {"maps": "labels", "labels": 6, "unlabelled": 255},
}


def pixels_of_a_map(kind, height, width):
    if kind == "labels":
        return RNG.integers(5, size=(height, width))
    if kind == "unlabelled":
        return RNG.choice([0, 1, 2, 3, 4, 255], size=(height, width))
    return RNG.integers(256, size=(height, width, 3))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def root(kind, tmp_path):
    """Nine pairs in folders, and the same in three shards; the members are packed by the standard library."""
    return written(tmp_path, kind)


def written(root, kind="rgb", ending="condition.png"):
    for i in range(COUNT):
        save(root / "images" / f"{i}.png", RNG.integers(256, size=(24, 40 - i, 3)))
        save(root / "conditions" / f"{i}.png", pixels_of_a_map(kind, 48, 80 - 2 * i))
    for first in range(0, COUNT, 3):
        members = []
        for i in range(first, first + 3):
            members.append((f"{i:04}.png", (root / "images" / f"{i}.png").read_bytes()))
            members.append((f"{i:04}.{ending}", (root / "conditions" / f"{i}.png").read_bytes()))
            members.append((f"{i:04}.cls", f"{i % 2}".encode()))
        pack(root / "shards" / f"train-{first // 3}.tar", members)
    return root


def folder(root, kind="rgb", **options):
    return Pairs(16, 0, root=str(root), validation_fraction=0, **KINDS[kind], **options).split("train")


def packed(root, kind="rgb", **options):
    return ShardPairs(16, 0, root=str(root / "shards"), validation=None, **KINDS[kind], **options).split("train")


def streamed(root, kind="rgb", **options):
    given = {"train": "train-{0..2}.tar", "train_images": COUNT, "classes": 2, "buffer": 1, **options}
    return ShardPairs(16, 0, root=f"file:{root / 'shards'}", validation=None, **KINDS[kind], **given).split("train")


def repack(root, change):
    """Pack the first shard again, with other members."""
    members = []
    for i in range(3):
        members.append((f"{i:04}.png", (root / "images" / f"{i}.png").read_bytes()))
        members.append((f"{i:04}.condition.png", (root / "conditions" / f"{i}.png").read_bytes()))
    pack(root / "shards" / "train-0.tar", change(dict(members)).items())


def worded(action):
    with pytest.raises((UserError, ValueError)) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize("crop", ["random", "center", "resized"])
@pytest.mark.parametrize("where", [packed, streamed])
def test_a_pair_of_a_shard_is_the_pair_of_the_folders(root, kind, where, crop):
    ours, theirs = where(root, kind, crop=crop), folder(root, kind, crop=crop)
    assert len(ours) == len(theirs) == COUNT
    for epoch in range(2):
        for i in range(COUNT):
            one, other = ours.item(epoch, i), theirs.item(epoch, i)
            assert torch.equal(one.image, other.image)
            assert torch.equal(one.condition, other.condition)
            assert torch.equal(one.crop_box, other.crop_box)
            assert one.label == i % 2


def test_training_on_a_stream_shows_images_with_their_maps(tmp_path):
    """With random pixels, no image can pass with the map of another."""
    written(tmp_path)
    plain = {"crop": "center", "flip": False}
    pairs = [folder(tmp_path, **plain).item(0, i) for i in range(COUNT)]
    maps = {each.image.numpy().tobytes(): each.condition for each in pairs}
    seen = list(itertools.islice(streamed(tmp_path, **plain).stream(0, 0, 1), 2 * COUNT))
    assert Counter(each.image.numpy().tobytes() for each in seen) == dict.fromkeys(maps, 2)
    assert all(torch.equal(each.condition, maps[each.image.numpy().tobytes()]) for each in seen)


def test_the_same_shards_are_images_without_maps(tmp_path):
    written(tmp_path)
    plain = Shards(16, 0, root=str(tmp_path / "shards"), validation=None).split("train")
    pairs = packed(tmp_path)
    for i in range(COUNT):
        assert torch.equal(plain.item(1, i).image, pairs.item(1, i).image)
        assert plain.item(1, i).condition is None


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("depth.png", {"condition": "depth"}),
        ("depth.png", {"condition": ".Depth.PNG", "image": "png"}),
        ("tif", {"condition": "tif"}),
        ("jpg", {"condition": "jpg", "image": ".png"}),
    ],
)
@pytest.mark.parametrize("where", [packed, streamed])
def test_endings_of_elsewhere(tmp_path, ending, options, where):
    written(tmp_path, ending=ending)
    split = where(tmp_path, **options)
    assert all(
        torch.equal(split.item(0, i).condition, folder(tmp_path).item(0, i).condition)
        and torch.equal(split.item(0, i).image, folder(tmp_path).item(0, i).image)
        for i in range(COUNT)
    )


def spoilt(members, how):
    name = "0001.condition.png"
    if how == "no map":
        del members[name]
    elif how == "broken":
        members[name] = members[name][:60]
    else:
        members[name] = png(size=(30, 30))
    return members


REASONS = {
    "no map": "no map",
    "broken": "its map '0001.condition.png': ",
    "another shape": "its map '0001.condition.png' has another shape: 30 x 30 and 39 x 24",
}


@pytest.mark.parametrize("how", REASONS)
@pytest.mark.parametrize("where", [packed, streamed])
def test_a_pair_with_a_bad_map_is_replaced_by_the_next_and_named_once(tmp_path, caplog, how, where):
    written(tmp_path)
    repack(tmp_path, lambda members: spoilt(members, how))
    with caplog.at_level(logging.WARNING, "vqf"):
        split = where(tmp_path, classes=0) if where is streamed else where(tmp_path)
        for _ in range(2):
            split.item(0, 1)
        same = where(tmp_path, crop="center", flip=False, **({"classes": 0} if where is streamed else {}))
        assert torch.equal(same.item(0, 1).image, same.item(0, 2).image)
        assert torch.equal(same.item(0, 1).condition, same.item(0, 2).condition)
    named = [
        each.message for each in caplog.records if f"cannot read 'train-0.tar/0001.png' ({REASONS[how]}" in each.message
    ]
    assert len(named) == 2  # once for each of the two splits


@pytest.mark.parametrize("where", [packed, streamed])
def test_a_member_that_is_no_image_is_no_map(tmp_path, where):
    """Such as `0001.depth.json`, metadata of a depth map."""
    written(tmp_path, ending="depth.png")
    before = [where(tmp_path, condition="depth", **PLAIN).item(0, i).condition for i in range(3)]
    members = []
    for i in range(3):
        for folder, ending in (("notes", "depth.json"), ("conditions", "depth.png"), ("images", "png")):
            path = tmp_path / folder / f"{i}.png"
            members.append((f"{i:04}.{ending}", path.read_bytes() if path.exists() else b"{}"))
        members.append((f"{i:04}.cls", b"0"))
    pack(tmp_path / "shards" / "train-0.tar", members)
    split = where(tmp_path, condition="depth", **PLAIN)
    assert all(torch.equal(split.item(0, i).condition, before[i]) for i in range(3))


def test_a_map_that_changed_on_the_disk_is_noticed(tmp_path):
    written(tmp_path)
    split = packed(tmp_path, crop="center", flip=False)
    path = tmp_path / "shards" / "train-0.tar"
    content = path.read_bytes()
    place = content.index((tmp_path / "conditions" / "1.png").read_bytes())
    path.write_bytes(content[: place + 100] + bytes(8) + content[place + 108 :])
    assert torch.equal(split.item(0, 1).image, split.item(0, 2).image)
    assert worded(lambda: split.file(1).read_map()).startswith("its checksum is not the one in train-0.tar.idx")


def test_many_images_without_a_map_stop_the_run_at_its_start(tmp_path, caplog):
    written(tmp_path)
    repack(tmp_path, lambda members: spoilt(members, "no map"))
    packed(tmp_path)
    assert "1 of the 9 train images have no map: 'train-0.tar/0001.png' has no .condition and" in caplog.text
    assert worded(lambda: packed(tmp_path, max_unreadable=0)).startswith(
        "data.condition=condition: 1 of the 9 train images"
    )
    message = worded(lambda: packed(tmp_path, condition="depth", max_unreadable=1))
    assert message == (
        "data.condition=depth: 9 of the 9 train images have no map: 'train-0.tar/0000.png' has no .depth and "
        "no .depth.* beside it"
    )


def test_a_shard_that_lost_pairs_keeps_their_places(tmp_path, caplog):
    written(tmp_path)
    names = [f"train-{i}.tar" for i in range(3)]
    (tmp_path / "shards" / "manifest.json").write_text(
        json.dumps({"shards": [{"name": name, "images": 3} for name in names]})
    )
    (tmp_path / "shards" / "train-1.tar").unlink()
    split = packed(tmp_path, max_unreadable=0.5, **PLAIN)
    assert len(split) == COUNT
    assert "have no map" not in caplog.text
    assert torch.equal(split.item(0, 3).condition, split.item(0, 6).condition)


@pytest.mark.parametrize("where", [packed, streamed])
def test_shards_are_read_as_their_manifest_says(tmp_path, where):
    written(tmp_path, "unlabelled")
    said = {"maps": {"maps": "labels", "labels": 6, "unlabelled": 255}}
    shards = [{"name": f"train-{i}.tar", "images": 3} for i in range(3)]
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps({"shards": shards, **said}))
    assert len(where(tmp_path, "unlabelled")) == COUNT
    for kind in ("rgb", "labels"):
        assert worded(lambda kind=kind: where(tmp_path, kind)) == (
            f"data.maps={kind}: the maps of these shards were written for other options, says manifest.json; give "
            "data.maps=labels data.labels=6 data.unlabelled=255"
        )


@pytest.mark.parametrize(
    "said",
    [
        *({"maps": each} for each in (1, "x", None, [])),
        *({"maps": "labels", "labels": each} for each in ("9", None, 1, 2.5)),
        *("rgb", ["rgb"], {}, 3, {"maps": "rgb", "labels": 0, "unlabelled": None}),
    ],
)
def test_a_manifest_that_makes_no_sense_says_nothing_of_maps(tmp_path, said):
    written(tmp_path)
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps({"maps": said}))
    assert len(packed(tmp_path)) == COUNT


def test_what_a_manifest_says_is_no_way_to_the_terminal(tmp_path):
    written(tmp_path)
    said = {"maps": "labels", "labels": 5, "unlabelled": "\x1b[2J\nall is well"}
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps({"maps": said}))
    message = worded(lambda: packed(tmp_path))
    assert message.endswith("; give data.maps=labels data.labels=5 data.unlabelled=null") and message.isprintable()


def test_the_fingerprint_follows_maps_and_how_they_are_read(tmp_path):
    written(tmp_path, "labels")
    for where in (packed, streamed):
        prints = [where(tmp_path, kind).fingerprint for kind in KINDS]
        assert len({*prints}) == len(prints)
        assert where(tmp_path).fingerprint == prints[0]
    assert streamed(tmp_path, condition="condition.png").fingerprint != streamed(tmp_path).fingerprint
    repack(tmp_path, lambda members: members)
    before = packed(tmp_path).fingerprint
    repack(tmp_path, lambda members: {**members, "0001.condition.png": members["0002.condition.png"]})
    assert packed(tmp_path).fingerprint != before


def test_a_map_in_no_shard_is_read_alike(kind):
    node = {"name": "shard_pairs", **KINDS[kind]}
    reader = condition_reader(node)
    assert reader == condition_reader({"name": "pairs", "root": "elsewhere", **KINDS[kind]})
    of_classes = {"unlabelled": None} if kind == "labels" else {}
    assert reader.options == {"maps": "rgb", **KINDS[kind], **of_classes}


def test_mistakes_are_worded(tmp_path):
    written(tmp_path)

    def said(**options):
        node = {"name": "shard_pairs", "root": str(tmp_path / "shards"), **options}
        return worded(lambda: build("data", node, image_size=16, seed=0))

    for options in (
        {"condition": ""},
        {"condition": ".png", "image": "png"},
        {"image": "condition.png"},
        {"condition": "depth", "image": ".Depth.tif"},
    ):
        assert said(**options).endswith(": give the extension of the map, and another one of its image")
    assert "labels=0, but maps=labels needs the number of classes" in said(maps="labels")
    assert said(root=str(tmp_path / "none")).startswith("data.root: no folder")
