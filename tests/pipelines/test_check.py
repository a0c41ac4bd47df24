import json

import pytest
from PIL import Image

from tests.data.packing import png
from tests.support.composing import compose
from vqf.errors import UserError
from vqf.pipelines.check import Check
from vqf.pipelines.shard import Shard


@pytest.fixture
def image_folder(tmp_path):
    root = tmp_path / "images"
    sizes = [(10, 20), (30, 20), (50, 90), (40, 20)]
    for i, size in enumerate(sizes):
        path = root / "train" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((i, 0, 0), size))
    (root / "val").mkdir()
    Image.new("L", (16, 16), 9).save(root / "train" / "grey.jpg")
    Image.new("L", (16, 16), 9).save(root / "train" / "misnamed.png", "JPEG")
    (root / "train" / "broken.png").write_bytes(b"no")
    (root / "val" / "copy.png").write_bytes(png((0, 0, 0), (10, 20)))
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_the_report_of_a_folder(image_folder, tmp_path, workers, caplog, capsys):
    config = compose("data=folder", f"data.root={image_folder}", "image_size=16", f"workers={workers}")
    Check(config, tmp_path / "run").run()
    report = json.loads((tmp_path / "run" / "check.json").read_text())
    train, validation = report["splits"]["train"], report["splits"]["validation"]
    assert (train["images"], validation["images"]) == (7, 1)
    assert list(train["unreadable"]) == ["train/broken.png"]
    assert train["width"] == {"min": 10, "median": 16, "max": 50}
    assert train["height"] == {"min": 16, "median": 20, "max": 90}
    assert train["shorter_side"] == {"min": 10, "median": 16, "max": 50}
    assert (train["upscaled"], validation["upscaled"]) == (1, 1)
    assert train["modes"] == {"RGB": 4, "L": 2}
    assert train["formats"] == {"PNG": 4, "JPEG": 2}
    assert report["duplicates"] == [
        ["train: train/0.png", "validation: val/copy.png"],
        ["train: train/grey.jpg", "train: train/misnamed.png"],
    ]
    assert report["in_both_splits"] == 1
    assert "train: cannot read 'train/broken.png' (not an image of a known format" in caplog.text
    assert "10 / 16 / 50" in capsys.readouterr().out


def test_every_kind_of_unreadable_image_is_named(tmp_path):
    """One image of each unreadable kind, among unusual ones that are fine."""
    made = {"fine.png": png(), "copy.png": png(), "empty.jpg": b"", "text.png": b"hello", "cut.png": png()[:60]}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    frames = [Image.new("RGB", (20, 16), color) for color in ("red", "blue")]
    for name, kind in (("moving.gif", "GIF"), ("phone.jpg", "MPO")):
        frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:])
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    Image.new("I;16", (16, 16)).save(tmp_path / "deep.png")
    Image.new("CMYK", (16, 16)).save(tmp_path / "print.jpg")
    frames[0].quantize(4).save(tmp_path / "palette.png")
    Image.new("RGBA", (16, 16)).save(tmp_path / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (90, 30)).save(tmp_path / "turned.jpg", exif=turned)
    config = compose("data=folder", f"data.root={tmp_path}", "image_size=16", "data.validation_fraction=0")
    Check(config, tmp_path / "run").run()
    report = json.loads((tmp_path / "run" / "check.json").read_text())
    part = report["splits"]["train"]
    assert part["unreadable"] == {
        "bomb.png": "9000 x 9000 pixels, more than max_pixels=67108864",
        "cut.png": "image file is truncated",
        "empty.jpg": "not an image of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)",
        "moving.gif": "animated; data.animated=first takes the first frame",
        "text.png": "not an image of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)",
    }
    assert part["modes"] == {"RGB": 4, "RGBA": 1, "I;16": 1, "P": 1, "CMYK": 1}
    assert part["formats"] == {"PNG": 5, "JPEG": 3}
    assert (part["height"]["max"], part["width"]["max"], part["upscaled"]) == (90, 30, 0)
    assert report["duplicates"] == [["train: copy.png", "train: fine.png"]]


def test_classes_and_how_many_images_each_has(tmp_path, capsys):
    root = tmp_path / "images"
    for i in range(30):
        path = root / ("train" if i < 24 else "test") / ("ant", "bee", "cow")[i % 3 if i < 24 else i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((i, 0, 0)))
    words = "data=folder", f"data.root={root}", "image_size=16"
    Check(compose(*words), tmp_path / "run").run()
    report = json.loads((tmp_path / "run" / "check.json").read_text())
    assert report["splits"]["train"]["classes"] == {"ant": 8, "bee": 8, "cow": 8}
    assert report["splits"]["validation"]["classes"] == {"ant": 3, "bee": 3, "cow": 0}
    assert "ant 3, bee 3, cow 0" in capsys.readouterr().out
    for i in range(20):
        (root / "train" / f"more{i}").mkdir()
        (root / "train" / f"more{i}" / "a.png").write_bytes(png((i, 9, 0)))
    Check(compose(*words), tmp_path / "run").run()
    assert "23, of 1 to 8" in capsys.readouterr().out
    Check(compose(*words, "data.labels=false"), tmp_path / "run").run()
    assert json.loads((tmp_path / "run" / "check.json").read_text())["splits"]["train"]["classes"] == {}


def test_a_union(image_folder, tmp_path):
    parts = (
        f"{{a:{{name:folder,root:{image_folder}}},b:{{name:folder,root:{image_folder / 'train'},validation_last:3}}}}"
    )
    Check(compose("data=union", f"+data.parts={parts}", "image_size=16"), tmp_path / "run").run()
    report = json.loads((tmp_path / "run" / "check.json").read_text())
    assert {name: part["images"] for name, part in report["splits"].items()} == {"train": 11, "validation": 4}
    named = [name for part in report["splits"].values() for name in part["unreadable"]]
    assert sorted(named) == ["a/train/broken.png", "b/broken.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_compared_with_their_manifest(image_folder, tmp_path, caplog, workers):
    out = tmp_path / "shards"
    config = compose("data=folder", f"data.root={image_folder}", "data.validation_last=0", "image_size=16")
    Shard(config, tmp_path, out=str(out), shard_size=2).run()
    words = "data=shards", f"data.root={out}", "image_size=16", f"workers={workers}"
    Check(compose(*words), tmp_path / "run").run()
    assert json.loads((tmp_path / "run" / "check.json").read_text())["damaged_shards"] == []
    with (out / "train-000001.tar").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    Check(compose(*words), tmp_path / "run").run()
    assert json.loads((tmp_path / "run" / "check.json").read_text())["damaged_shards"] == ["train-000001.tar"]
    assert "shard 'train-000001.tar' is damaged: its sha256 differs from manifest.json" in caplog.text
    for path in out.glob("train-000002.tar*"):
        path.unlink()
    with pytest.raises(UserError, match=r"^data\.max_unreadable=0\.01: 2 of the 7 train images in manifest\.json of"):
        Check(compose(*words), tmp_path / "run").run()


def test_a_source_without_files_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"^data 'emoji' has no image files to check: it generates or streams its images$"
    ):
        Check(compose("data=emoji", "image_size=16"), tmp_path / "run").run()


def test_a_folder_of_broken_images(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    config = compose("data=folder", f"data.root={tmp_path}", "image_size=16", "data.validation_fraction=0")
    Check(config, tmp_path / "run").run()
    (part,) = json.loads((tmp_path / "run" / "check.json").read_text())["splits"].values()
    assert (len(part["unreadable"]), part["width"], part["modes"]) == (3, {}, {})
