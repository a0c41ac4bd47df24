import json

import pytest
from PIL import Image

from tests.composing import compose
from tests.data.packing import png
from vqf.errors import UserError
from vqf.pipelines.check import Check


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
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
def test_what_a_folder_holds(pictures, tmp_path, workers, caplog, capsys):
    config = compose("data=folder", f"data.root={pictures}", "image_size=16", f"workers={workers}")
    Check(config, tmp_path / "run").run()
    report = json.loads((tmp_path / "run" / "check.json").read_text())
    train, validation = report["parts"]["train"], report["parts"]["validation"]
    assert (train["pictures"], validation["pictures"]) == (7, 1)
    assert list(train["unreadable"]) == ["train/broken.png"]
    assert train["width"] == {"min": 10, "median": 16, "max": 50}
    assert train["height"] == {"min": 16, "median": 20, "max": 90}
    assert train["shorter_side"] == {"min": 10, "median": 16, "max": 50}
    assert train["modes"] == {"RGB": 4, "L": 2}
    assert train["formats"] == {"PNG": 4, "JPEG": 2}
    assert report["duplicates"] == [
        ["train: train/0.png", "validation: val/copy.png"],
        ["train: train/grey.jpg", "train: train/misnamed.png"],
    ]
    assert report["in_both_parts"] == 1
    assert "train: cannot read 'train/broken.png' (not a picture of a known format" in caplog.text
    assert "10 / 16 / 50" in capsys.readouterr().out


def test_a_source_without_files(tmp_path):
    with pytest.raises(UserError, match=r"^data 'emoji' keeps no files that could be checked$"):
        Check(compose("data=emoji", "image_size=16"), tmp_path / "run").run()


def test_a_folder_of_broken_pictures(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    config = compose("data=folder", f"data.root={tmp_path}", "image_size=16", "data.validation_share=0")
    Check(config, tmp_path / "run").run()
    (part,) = json.loads((tmp_path / "run" / "check.json").read_text())["parts"].values()
    assert (len(part["unreadable"]), part["width"], part["modes"]) == (3, {}, {})
