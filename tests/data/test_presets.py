import pytest
from PIL import Image

from tests.support.composing import compose
from vqf.data.files.packed import File
from vqf.data.files.train_validation import split_files
from vqf.data.folder import COUNT_LABELS
from vqf.data.labels import class_numbers
from vqf.errors import UserError
from vqf.registry import build

PRESETS = ["ade20k", "celebahq", "coco_stuff", "ffhq", "imagenet", "lsun"]
PAIRS = ["ade20k_pairs", "coco_stuff_pairs"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_missing_folder_says_what_is_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = compose(f"data={name}").data
    with pytest.raises(UserError) as caught:
        build("data", node, image_size=16, seed=0)
    assert str(caught.value).startswith(f"data.root: no folder '{node.root}' (")
    assert "http" in str(caught.value)


@pytest.mark.parametrize("name", PAIRS)
def test_missing_pairs_say_what_is_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = compose(f"data={name}").data
    for option, folder in (("root", node.images), ("conditions", node.conditions)):
        with pytest.raises(UserError) as caught:
            build("data", node, image_size=16, seed=0)
        assert str(caught.value).startswith(f"data.{option}: no folder '{node.root}/{folder}' (")
        assert "http" in str(caught.value)
        image = tmp_path / node.root / folder / "a.jpg"
        image.parent.mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(image)


@pytest.mark.parametrize(
    ("name", "folders"),
    [("coco_stuff", {"train2017": 118_287, "val2017": 5000}), ("ade20k", {"training": 20_210, "validation": 2000})],
)
def test_the_last_images_are_the_official_validation(name, folders):
    files = sorted(File(f"{folder}/{i:012}.jpg", 1) for folder, count in folders.items() for i in range(count))
    partition = split_files(files, 0.05, compose(f"data={name}").data.validation_last)
    train, validation = folders
    assert {file.name.split("/")[0] for file in partition.train} == {train}
    assert {file.name.split("/")[0] for file in partition.validation} == {validation}


def test_imagenet_classes_are_numbered_as_everywhere():
    from timm.data import ImageNetInfo

    published = ImageNetInfo("imagenet-1k").label_names()
    files = [File(f"{part}/{name}/1.JPEG", 1) for part in ("val", "train") for name in reversed(published)]
    classes, numbers = class_numbers(split_files(files, 0.05, None).labels)
    assert classes == published
    assert (published[0], published[999], numbers["n01440764"]) == ("n01440764", "n15075141", 0)


def test_imagenet_classes_are_its_folders(tmp_path):
    for path in ("train/n02/b.JPEG", "train/n01/a.JPEG", "val/n02/c.JPEG"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / path)
    data = build("data", compose("data=imagenet", f"data.root={tmp_path}").data, image_size=16, seed=0)
    assert data.classes == ["n01", "n02"]
    assert data.split("train").labels.tolist() == [0, 1]
    assert data.split("validation").labels.tolist() == [1]


@pytest.mark.parametrize("name", [*(each for each in PRESETS if each != "lsun"), *PAIRS])
def test_an_incomplete_data_set_is_a_warning(name, tmp_path, caplog):
    node = compose(f"data={name}", f"data.root={tmp_path}").data
    for folder in {node.get("images", "."), node.get("conditions", ".")}:
        for part in ("train", "val"):
            path = tmp_path / folder / part / "n01" / "a.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16)).save(path)
    data = build("data", node, image_size=16, seed=0)
    found = {"train": len(data.partition.train), "validation": len(data.partition.validation), "classes": 0}
    (line,) = [each.getMessage() for each in caplog.records if "expected" in each.getMessage()]
    for key, count in node.expected_counts.items():
        assert f"{found[key]} {COUNT_LABELS[key]} where {count:,} are expected" in line
    caplog.clear()
    build("data", {**node, "expected_counts": found}, image_size=16, seed=0)
    assert not caplog.records
    with pytest.raises(ValueError, match=r"expected_counts\.test: only train, validation, classes can be expected"):
        build("data", {**node, "expected_counts": {"test": 3}}, image_size=16, seed=0)


def test_the_numbers_are_those_of_the_sets():
    """As taming-transformers and the sets' own pages have them."""
    totals = {"ffhq": 70_000, "celebahq": 30_000, "imagenet": 1_331_167, "ade20k": 22_210, "coco_stuff": 123_287}
    for name, total in totals.items():
        expected = compose(f"data={name}").data.expected_counts
        assert expected.train + expected.validation == total
        if (last := compose(f"data={name}").data.get("validation_last")) is not None:
            assert expected.validation == last
