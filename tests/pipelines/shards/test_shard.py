"""Sources written into shards and read back."""

import hashlib
import io

import pytest
import torch
from PIL import Image

from tests.data.packing import png, red
from tests.pipelines.shards.sharding import configured, files, make_images, read, written
from tests.support.composing import compose
from vqf.errors import EmptySplitError, UserError
from vqf.registry import Component, _components, build


@pytest.fixture
def image_folder(tmp_path):
    return make_images(tmp_path / "images")


@pytest.mark.parametrize("workers", [0, 2])
def test_original_files_are_copied_byte_by_byte(image_folder, tmp_path, workers):
    to = tmp_path / "shards"
    manifest = written(configured(image_folder, workers=workers), to, shard_size=6)
    assert manifest["finished"]
    assert manifest["images"] == {"train": 20, "validation": 3}
    assert [each["images"] for each in manifest["shards"]] == [6, 6, 6, 2, 3]
    for each in manifest["shards"]:
        content = (to / each["name"]).read_bytes()
        assert (each["bytes"], each["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    data, split = read(to)
    assert data.classes == ["ant", "bee"]
    names = sorted(path for path in image_folder.glob("train/*/*.png"))
    for i in range(20):
        original = names[int(split.names[i].split("/")[1][:8])]
        assert split.file(i).read_bytes() == original.read_bytes()
        assert data.classes[split.item(0, i).label] == original.parent.name
    assert sorted(red(split.item(0, i)) for i in range(20)) == list(range(20))
    assert [red(split.item(0, i)) for i in range(20)] != list(range(20))


def test_webdataset_reads_what_is_written(image_folder, tmp_path):
    import webdataset

    to = tmp_path / "shards"
    written(configured(image_folder), to, shard_size=50)
    expected = list(webdataset.WebDataset(str(to / "train-000000.tar"), shardshuffle=False).decode("pil"))
    assert len(expected) == 20
    for each in expected:
        assert (image_folder / each["json"]["name"]).is_file()
        assert each["cls"] == ("ant", "bee").index(each["json"]["name"].split("/")[1])
        assert each["png"].getpixel((0, 0))[0] == int(each["json"]["name"][-6:-4])


def test_the_same_command_writes_the_same_bytes(image_folder, tmp_path):
    for name, workers in (("a", 0), ("b", 2)):
        written(configured(image_folder, workers=workers), tmp_path / name, format="jpg", shard_size=7)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    written(configured(image_folder, "seed=1"), tmp_path / "c", format="jpg", shard_size=7)
    assert files(tmp_path / "a").keys() == files(tmp_path / "c").keys()
    assert files(tmp_path / "a") != files(tmp_path / "c")


@pytest.mark.parametrize(("kind", "name"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_formats_and_sizes(image_folder, tmp_path, kind, name):
    for path in list(image_folder.glob("train/*/*"))[1:]:
        path.unlink()
    (path,) = image_folder.glob("train/*/*")
    Image.new("RGBA", (100, 60), (10, 200, 30, 0)).save(path)
    to = tmp_path / "shards"
    written(configured(image_folder), to, format=kind, size=20, shuffle=False)
    _, split = read(to)
    image = Image.open(io.BytesIO(split.file(0).read_bytes()))
    assert (image.format, image.mode, image.size) == (name, "RGB", (33, 20))
    assert all(abs(each - 255) <= 2 for each in split.file(0).load_image().getpixel((5, 5)))  # transparency is white
    _, small = read(to, "validation")
    assert split.names[0].endswith(f".{kind}")
    assert small.file(0).load_image().size == (27, 20)
    written(configured(image_folder), tmp_path / "large", format=kind, size=500)
    assert read(tmp_path / "large", "validation")[1].file(0).load_image().size == (40, 30)


def test_a_source_without_files_is_rendered(tmp_path):
    config = compose("data=emoji", "image_size=16")
    to = tmp_path / "shards"
    with pytest.raises(UserError, match=r"^format=original: data 'emoji' has no files to copy; give format=png$"):
        written(config, to)
    manifest = written(config, to, format="png", shuffle=False)
    assert manifest["images"] == {"train": 1400, "validation": 236}
    data = build("data", {"name": "shards", "root": str(to), "flip": False}, image_size=16, seed=0)
    emoji = build("data", {"name": "emoji"}, image_size=16, seed=0)
    assert data.classes == emoji.classes
    for part in ("train", "validation"):
        actual, expected = data.split(part), emoji.split(part)
        for i in range(0, len(actual), 80):
            assert (actual.item(0, i).image - expected.item(0, i).image).abs().max() <= 0.5 / 127.5 + 1e-5
        assert actual.labels.tolist() == list(expected.labels)


def test_an_mpo_file_of_a_phone_is_copied_as_jpeg(image_folder, tmp_path):
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    path = image_folder / "val" / "ant" / "20.png"
    frames[0].save(path, "MPO", save_all=True, append_images=frames[1:])
    written(configured(image_folder), tmp_path / "shards")
    _, split = read(tmp_path / "shards", "validation")
    assert split.names[0].endswith("00000000.jpg")
    assert split.file(0).read_bytes() == path.read_bytes()
    assert split.file(0).load_image().getpixel((5, 5))[0] > 250


def test_a_union_is_copied_file_by_file(image_folder, tmp_path):
    """Full files, not the crops that the union serves; a broken file is not replaced by its neighbor."""
    (image_folder / "train" / "ant" / "04.png").write_bytes(b"broken")
    parts = [
        f"data.parts.{kind}={{name:folder,root:{image_folder}/train/{kind},validation_last:2}}"
        for kind in ("ant", "bee")
    ]
    config = compose("data=union", "+data.parts={}", *(f"+{part}" for part in parts), "image_size=16")
    manifest = written(config, tmp_path / "shards", shuffle=False)
    assert manifest["classes"] == ["ant", "bee"]
    assert [each["images"] for each in manifest["shards"]] == [15, 4]
    assert [each["name"] for each in manifest["shards"][0]["skipped"]] == ["ant/04.png"]
    _, split = read(tmp_path / "shards")
    originals = [path for kind in ("ant", "bee") for path in sorted(image_folder.glob(f"train/{kind}/*"))[:8]]
    originals = [path for path in originals if path.name != "04.png"]
    assert [split.file(i).read_bytes() for i in range(15)] == [path.read_bytes() for path in originals]
    assert split.labels.tolist() == [0] * 7 + [1] * 8


def test_a_union_with_a_source_without_files_keeps_the_files_of_the_other(image_folder, tmp_path):
    """Full files, not crops; a broken file is not replaced by its neighbor."""
    (image_folder / "train" / "ant" / "04.png").write_bytes(b"broken")
    parts = [f"{{name:folder,root:{image_folder}/train/ant,validation_last:2}}", "{name:emoji}"]
    words = [f"+data.parts={{ants:{parts[0]},emoji:{parts[1]}}}", "image_size=16"]
    config = compose("data=union", *words)
    with pytest.raises(UserError, match="data 'union' has no files to copy"):
        written(config, tmp_path / "shards")
    manifest = written(config, tmp_path / "shards", format="png", shuffle=False)
    assert [each["name"] for each in manifest["shards"][0]["skipped"]] == ["ants/04.png"]
    _, split = read(tmp_path / "shards")
    assert [split.file(i).load_image().size for i in range(8)] == [(40, 30)] * 7 + [(16, 16)]
    assert [red(split.item(0, i)) for i in range(7)] == [0, 2, 6, 8, 10, 12, 14]
    assert split.labels.tolist() == [0] * 7 + [1] * 1400


def test_names_contain_no_absolute_path_and_may_repeat(tmp_path):
    """A list file with absolute paths of images that share a name."""
    paths = [tmp_path / each / "p.png" for each in ("a", "b", "c", "d")]
    for i, path in enumerate(paths):
        path.parent.mkdir()
        path.write_bytes(png((i, 0, 0)) if i < 2 else b"broken")
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "v.png").write_bytes(png())
    words = [
        f"data.root={tmp_path / 'in'}",
        f"data.train={tmp_path / 'list.txt'}",
        "data.max_unreadable=0.5",
        "image_size=16",
    ]
    for size in (1, 4):
        manifest = written(compose("data=folder", *words), tmp_path / f"to{size}", shard_size=size, shuffle=False)
        lost = [each for entry in manifest["shards"] for each in entry["skipped"]]
        assert [(each["key"], each["name"]) for each in lost] == [("00000002", "p.png"), ("00000003", "p.png")]
        assert all(str(tmp_path).encode() not in path.read_bytes() for path in tmp_path.glob(f"to{size}/*"))


def test_a_huge_shard_holds_all(image_folder, tmp_path):
    manifest = written(configured(image_folder), tmp_path / "shards", shard_size=10**18)
    assert [each["images"] for each in manifest["shards"]] == [20, 3]


class Stored:
    """An image file of a plugin, which inherits nothing from vqf."""

    name, label = "own", None

    def __init__(self, index):
        self.index = index

    def read_bytes(self):
        if self.index == 3:
            raise FileNotFoundError(2, "No such file or directory", "x")
        return png((self.index, 0, 0))

    def load_image(self):
        return Image.open(io.BytesIO(self.read_bytes()))

    def probe(self, content):
        return ("PNG", "RGB", 20, 16)


class Own:
    """A data source of a plugin with image files, without a limit of unreadable images."""

    classes, names, fingerprint = (), ("a", "b", "c", "d"), "own"

    def __init__(self, image_size, seed):
        pass

    def split(self, name):
        if name != "train":
            raise EmptySplitError("nothing held out")
        return self

    def __len__(self):
        return 4

    def file(self, index):
        return Stored(index)


@pytest.mark.parametrize("how", ["original", "png"])
def test_image_files_of_a_plugin(tmp_path, monkeypatch, how):
    monkeypatch.setitem(_components["data"], "own", Component("data", "own", Own, ("image_size", "seed"), {}, {}))
    alone, union = (compose("data=emoji", "image_size=16") for _ in range(2))
    alone.data = {"name": "own"}
    union.data = {"name": "union", "parts": {"one": {"name": "own"}, "other": {"name": "own"}}}
    for config, count in ((alone, 3), (union, 6)):
        to = tmp_path / str(count)
        manifest = written(config, to, format=how, shuffle=False)
        assert manifest["images"] == {"train": count}
        assert {each["reason"] for each in manifest["shards"][0]["skipped"]} == {"no such file or directory"}
        _, split = read(to, validation=None)
        assert [red(split.item(0, i)) for i in range(count)] == [0, 1, 2] * (count // 3)
        assert split.labels is None if count == 3 else split.labels.tolist() == [0] * 3 + [1] * 3


def test_shards_of_shards(image_folder, tmp_path):
    written(configured(image_folder), tmp_path / "first", shuffle=False)
    config = compose("data=shards", f"data.root={tmp_path / 'first'}", "image_size=16")
    written(config, tmp_path / "second", shard_size=3, shuffle=False)
    one, two = (read(tmp_path / each)[1] for each in ("first", "second"))
    assert [one.file(i).read_bytes() for i in range(20)] == [two.file(i).read_bytes() for i in range(20)]
    assert torch.equal(one.labels, two.labels)
