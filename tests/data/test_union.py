import logging

import pytest
import torch
from PIL import Image

from tests.support.composing import compose
from vqf.batch import Batch
from vqf.data.folder import Folder
from vqf.data.images.decode import UnreadableError
from vqf.data.images.maps import MapDecoder
from vqf.data.union import Union
from vqf.errors import EmptySplitError, UserError
from vqf.registry import build, call_static


def paint(folder, count, green):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20, 16), (i, green, 0)).save(folder / f"{i:03}.png")


@pytest.fixture
def folders(tmp_path):
    paint(tmp_path / "few", 5, 10)
    paint(tmp_path / "many", 9, 200)
    return tmp_path


def union(folders, image_size=16, seed=0):
    parts = {
        name: {"name": "folder", "root": str(folders / name), "validation_last": last, "labels": False}
        for name, last in (("few", 2), ("many", 3))
    }
    return Union(image_size, seed, parts=parts)


def colours(split, epoch=0):
    seen = [split.item(epoch, index) for index in range(len(split))]
    return [(sample.label, *((sample.image[:2, 0, 0] + 1) * 127.5).round().int().tolist()) for sample in seen]


def test_every_image_of_every_source_is_there_once_with_its_source_as_label(folders):
    data = union(folders)
    assert data.classes == ["few", "many"]
    assert colours(data.split("train")) == [(0, i, 10) for i in range(3)] + [(1, i, 200) for i in range(6)]
    assert colours(data.split("validation")) == [(0, i, 10) for i in (3, 4)] + [(1, i, 200) for i in (6, 7, 8)]


def test_a_source_that_holds_nothing_out_is_missing_from_validation_alone(folders):
    def union(*lasts):
        parts = {
            name: {"name": "folder", "root": str(folders / name), "validation_last": last, "labels": False}
            for name, last in zip(("few", "many"), lasts, strict=True)
        }
        return Union(16, 0, parts=parts)

    data = union(0, 3)
    assert len(data.split("train")) == 11
    held_out = data.split("validation")
    assert colours(held_out) == [(1, i, 200) for i in (6, 7, 8)]
    assert held_out.labels.tolist() == [1, 1, 1] and held_out.names[0] == "many/006.png"
    with pytest.raises(EmptySplitError, match=r"^data\.parts\.many\.root: no validation images among the 9 in .*; "):
        union(0, 0).split("validation")


def test_a_source_shows_its_own_images(folders):
    """Up to random numbers, which differ from source to source."""
    validation = union(folders).split("validation")
    alone = Folder(16, 0, root=str(folders / "many"), validation_last=3).split("validation")
    assert all(torch.equal(validation.item(0, 2 + i).image, alone.item(0, i).image) for i in range(3))
    for folder in ("few", "many"):
        pixels = torch.arange(64 * 64 * 3, dtype=torch.uint8).reshape(64, 64, 3)
        for path in (folders / folder).iterdir():
            Image.fromarray(pixels.numpy()).save(path)
    train = union(folders).split("train")
    crops = [[train.item(epoch, index).image for epoch in range(8)] for index in (0, 3)]
    assert not all(torch.equal(a, b) for a, b in zip(*crops, strict=True))
    again = union(folders).split("train")
    assert all(torch.equal(again.item(epoch, 3).image, crops[1][epoch]) for epoch in range(8))


def test_the_fingerprint_follows_every_source(folders):
    before = union(folders).split("train").fingerprint
    assert before == union(folders).split("train").fingerprint
    assert before != union(folders).split("validation").fingerprint
    paint(folders / "few", 6, 10)
    after = union(folders).split("train").fingerprint
    assert after != before != union(folders, seed=1).split("train").fingerprint


def test_log_lines_of_a_source_name_its_options(folders, caplog):
    (folders / "few" / "notes.txt").touch()
    (folders / "many" / "0.png").write_bytes(b"")
    caplog.set_level(logging.INFO, "vqf")
    split = union(folders).split("train")
    for i in range(len(split)):
        split.item(0, i)
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if line.startswith("data.parts.few.root: 1 files (.txt 1) in")]
    assert [line for line in lines if line.startswith("data.parts.many.root: cannot read '0.png'")]


def test_files_are_those_of_the_sources(folders):
    train = union(folders).split("train")
    assert list(train.names) == [f"few/{i:03}.png" for i in range(3)] + [f"many/{i:03}.png" for i in range(6)]
    assert train.names[2:4] == ["few/002.png", "many/000.png"]
    assert train.labels.tolist() == [train.item(0, i).label for i in range(9)] == [0] * 3 + [1] * 6
    for i in range(9):
        path = folders / train.names[i]
        assert train.file(i).read_bytes() == path.read_bytes()
        assert train.file(i).load_image().size == (20, 16)
        assert train.file(i).probe(train.file(i).read_bytes())[:4] == ("PNG", "RGB", 20, 16)
    (folders / "few" / "001.png").write_bytes(b"broken")
    with pytest.raises(UnreadableError):
        train.file(1).load_image()
    assert train.item(0, 1).label == 0
    assert [flags.tolist() for flags in train.read_error_flags()] == [[False, True, False], [False] * 6]
    with pytest.raises(IndexError):
        train.names[9]


def test_a_source_without_files_leaves_the_union_without(folders):
    parts = {"few": {"name": "folder", "root": str(folders / "few")}, "emoji": {"name": "emoji"}}
    assert not hasattr(Union(16, 0, parts=parts).split("train"), "stored")


def test_beside_its_image_a_sample_has_what_every_source_has(folders, tmp_path):
    """Samples of which only some have a mask or a map do not collate."""
    for i in range(4):
        for part, name in (("images", f"{i}.jpg"), ("conditions", f"{i}.png")):
            (tmp_path / "pairs" / part).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 16), (i, 0, 0)).save(tmp_path / "pairs" / part / name)
    made = {
        "few": {"name": "folder", "root": str(folders / "few"), "labels": False},
        "emoji": {"name": "emoji"},
        "pairs": {"name": "pairs", "root": str(tmp_path / "pairs")},
        "grey": {"name": "pairs", "root": str(tmp_path / "pairs"), "maps": "grey"},
        "again": {"name": "pairs", "root": str(tmp_path / "pairs")},
    }

    def beside(*names):
        split = Union(16, 0, parts={name: made[name] for name in names}).split("train")
        batch = Batch.collate([split.item(0, i) for i in (0, len(split) - 1)])
        return {each for each in ("masks", "conditions", "crop_boxes") if getattr(batch, each) is not None}

    assert beside("few", "emoji") == beside("emoji", "few") == set()
    assert beside("few", "pairs") == beside("pairs", "grey") == {"crop_boxes"}
    assert beside("pairs", "again") == {"conditions", "crop_boxes"}
    assert beside("emoji") == {"masks"}


def test_validation_has_the_fields_of_training(folders, tmp_path):
    """Even if the source without maps has no validation images."""
    for part in ("images", "conditions"):
        paint(tmp_path / "pairs" / part, 6, 5)
    parts = {
        "pairs": {"name": "pairs", "root": str(tmp_path / "pairs"), "validation_last": 2},
        "few": {"name": "folder", "root": str(folders / "few"), "labels": False, "validation_fraction": 0},
    }
    data = Union(16, 0, parts=parts)
    for part in ("train", "validation"):
        assert data.split(part).item(0, 0).condition is None


def test_maps_are_read_as_all_sources_read_theirs():
    pairs, grey = ({"name": "pairs", "root": "elsewhere", "maps": maps} for maps in ("rgb", "grey"))
    palette = {"name": "pairs", "root": "elsewhere", "maps": "palette"}

    def reader(*nodes):
        return call_static(
            "data", {"name": "union", "parts": dict(zip("abc", nodes, strict=False))}, "condition_reader"
        )

    assert reader(pairs, {**pairs, "root": "other"}) == MapDecoder("rgb")
    assert reader(palette, {"name": "earth"}, {"name": "union", "parts": {"x": palette}}) == MapDecoder("palette")
    assert reader({"name": "emoji"}, {"name": "emoji"}) is None
    for others in ((pairs, grey), (pairs, {"name": "emoji"}), ({"name": "emoji"}, pairs)):
        with pytest.raises(
            ValueError, match=r"data\.parts: 'a' and 'b' have condition maps of different kinds, or only one has maps"
        ):
            reader(*others)


def test_mistakes_are_worded(folders):
    def worded(parts):
        with pytest.raises(ValueError) as caught:
            build("data", {"name": "union", "parts": parts}, image_size=16, seed=0)
        return str(caught.value)

    assert worded({}) == ("data 'union': parts is empty; name sources, as in data.parts.faces={name:folder,root:faces}")
    assert worded({"a": {"name": "foldr"}}).startswith("data.parts.a: unknown data 'foldr'. Did you mean 'folder'")
    assert worded({"a": {"name": "folder", "root": "x", "flp": 1}}).startswith("data.parts.a.flp: unknown option 'flp'")
    assert worded({"a": {"name": "folder", "root": "data.d"}}) == (
        "data.parts.a.root: no folder 'data.d'; point data.parts.a.root to a folder of images"
    )
    with pytest.raises(UserError, match=r"^unknown split 'test'"):
        union(folders).split("test")


def test_faceshq_is_celebahq_and_ffhq(tmp_path):
    roots = [f"data.parts.{name}.root={tmp_path / name}" for name in ("celebahq", "ffhq")]
    counts = [f"data.parts.{name}.validation_last=1" for name in ("celebahq", "ffhq")]
    paint(tmp_path / "celebahq", 3, 1)
    paint(tmp_path / "ffhq", 4, 2)
    node = compose("data=faceshq", *roots, *counts).data
    data = build("data", node, image_size=16, seed=0)
    assert colours(data.split("train")) == [(0, 0, 1), (0, 1, 1), (1, 0, 2), (1, 1, 2), (1, 2, 2)]
    for name in ("celebahq", "ffhq"):
        alone, part = compose(f"data={name}").data, compose("data=faceshq").data.parts[name]
        assert {key: alone[key] for key in part} == dict(part)
