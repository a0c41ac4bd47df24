import logging
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from vqf.data.files.packed import PackedStrings
from vqf.data.folder import Folder
from vqf.errors import UserError
from vqf.registry import build


def paint(path, color=(200, 30, 60), size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def flat(tmp_path):
    for i in range(40):
        paint(tmp_path / f"{i:02}.png", (i, 0, 0))
    return tmp_path


def names(data, part="train"):
    return list(data.split(part).names)


def red(sample):
    return round(float(sample.image[0].mean() + 1) * 127.5)


def worded(action):
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def test_the_hash_split_is_frozen_and_disjoint(flat):
    data = Folder(16, 0, root=str(flat), validation_fraction=0.2)
    assert names(data, "validation") == [
        "00.png",
        "02.png",
        "03.png",
        "04.png",
        "06.png",
        "14.png",
        "18.png",
        "33.png",
        "34.png",
        "38.png",
    ]
    assert sorted(names(data) + names(data, "validation")) == [f"{i:02}.png" for i in range(40)]
    assert data.classes == []
    assert data.split("train").item(0, 0).label is None


def test_adding_images_moves_none_to_the_other_split(flat):
    before = Folder(16, 0, root=str(flat), validation_fraction=0.3)
    sides = set(names(before)), set(names(before, "validation"))
    for i in range(40, 80):
        paint(flat / f"{i:02}.png")
    after = Folder(16, 0, root=str(flat), validation_fraction=0.3)
    assert sides[0] < set(names(after))
    assert sides[1] < set(names(after, "validation"))


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_tiny_folder_has_both_splits(tmp_path, share):
    for i in range(3):
        paint(tmp_path / f"{i}.png")
    data = Folder(16, 0, root=str(tmp_path), validation_fraction=share)
    assert {len(data.split("train")), len(data.split("validation"))} == {1, 2}


def test_a_fraction_of_one_is_everything_whatever_the_folders_are_called(tmp_path):
    paint(tmp_path / "train" / "a.png")
    paint(tmp_path / "val" / "b.png")
    data = Folder(16, 0, root=str(tmp_path), validation_fraction=1.0)
    assert names(data, "validation") == ["train/a.png", "val/b.png"]


def test_the_last_by_path(flat):
    data = Folder(16, 0, root=str(flat), validation_last=10)
    assert names(data) == [f"{i:02}.png" for i in range(30)]
    assert names(data, "validation") == [f"{i:02}.png" for i in range(30, 40)]


@pytest.mark.parametrize("held_out", ["val", "validation"])
def test_train_and_val_folders_and_their_classes(tmp_path, held_out):
    for name in (
        "train/dog/1.png",
        "train/cat/a/2.png",
        f"{held_out}/cat/3.png",
        f"{held_out}/emu/4.png",
        "test/5.png",
    ):
        paint(tmp_path / name)
    data = Folder(16, 0, root=str(tmp_path))
    assert data.classes == ["cat", "dog", "emu"]
    assert names(data) == ["train/cat/a/2.png", "train/dog/1.png"]
    assert names(data, "validation") == [f"{held_out}/cat/3.png", f"{held_out}/emu/4.png"]
    train, validation = data.split("train"), data.split("validation")
    assert [train.item(0, i).label for i in range(2)] == [0, 1]
    assert [validation.item(0, i).label for i in range(2)] == [0, 2]
    assert Folder(16, 0, root=str(tmp_path), labels=False).split("train").item(0, 0).label is None


def test_an_image_outside_the_class_folders_means_no_labels(tmp_path, caplog):
    for name in ("dog/1.png", "cat/2.png", "stray.png"):
        paint(tmp_path / name)
    with caplog.at_level(logging.WARNING, "vqf"):
        assert Folder(16, 0, root=str(tmp_path)).classes == []
    assert "no labels, because 'stray.png' lies in no class folder" in caplog.text


def test_hidden_files_other_endings_and_circular_links_are_left_out(tmp_path):
    for name in ("a.PNG", "b.JPEG", ".c.png", ".hidden/d.png", "__MACOSX/._e.png"):
        paint(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "again").symlink_to(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    paint(outside / "f.png")
    (tmp_path / "linked").symlink_to(outside)
    data = Folder(16, 0, root=str(tmp_path), validation_fraction=0)
    assert names(data) == ["a.PNG", "b.JPEG", "linked/f.png"]


def test_lists(flat, caplog):
    (flat / "train.txt").write_text("03.png\n\n01.png\n")
    (flat / "val.txt").write_text(f"{flat / '02.png'}\n")
    lists = {"train": str(flat / "train.txt"), "validation": str(flat / "val.txt")}
    data = Folder(16, 0, root=str(flat), **lists)
    assert (names(data), names(data, "validation")) == (["03.png", "01.png"], ["02.png"])
    assert red(data.split("train").item(0, 0)) == 3
    rest = Folder(16, 0, root=str(flat), validation=lists["validation"])
    assert names(rest) == [f"{i:02}.png" for i in range(40) if i != 2]
    assert not caplog.records
    Folder(16, 0, root=str(flat), train=lists["train"], validation=lists["train"])
    assert "2 of its images are trained on too, such as '01.png'" in caplog.text


def test_tables(flat, caplog):
    table = flat / "train.csv"
    lists = {"train": str(table), "validation": str(flat / "val.CSV")}
    table.write_text('note,label,path\n"a, b",dog,03.png\n,cat,01.png\n,dog,"02.png"\n')
    (flat / "val.CSV").write_text("path,label\r\n04.png,emu\r\n")
    data = Folder(16, 0, root=str(flat), **lists)
    assert data.classes == ["cat", "dog", "emu"]
    train, validation = data.split("train"), data.split("validation")
    assert list(train.names) == ["03.png", "01.png", "02.png"]
    assert (train.labels.tolist(), validation.labels.tolist()) == ([1, 0, 1], [2])
    assert Folder(16, 0, root=str(flat), labels=False, **lists).classes == []
    before = train.fingerprint
    table.write_text("path,label\n03.png,5\n01.png,0\n02.png,5\n")
    (flat / "val.CSV").write_text("path,label\n04.png,2\n")
    numbers = Folder(16, 0, root=str(flat), **lists)
    assert numbers.classes == [str(i) for i in range(6)]
    assert numbers.split("train").labels.tolist() == [5, 0, 5]
    assert numbers.split("train").fingerprint != before
    assert not caplog.records
    table.write_text("path\n03.png\n")
    assert Folder(16, 0, root=str(flat), **lists).classes == []
    assert "no labels, because '03.png' has none in a table" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.train: the first line of 'list.csv' names no column 'path' (it has: )"),
        ("file,label\n", "data.train: the first line of 'list.csv' names no column 'path' (it has: file, label)"),
        ("path,label\n03.png,a\n04.png,\n", "data.train: line 3 of 'list.csv' has no label"),
        ("path,label\n03.png,a\n,b\n", "data.train: line 3 of 'list.csv' has no path"),
        ("path\n03.png\nnone.png\n", "data.train: line 3 of 'list.csv' names 'none.png', which is not in '.'"),
        ("path\n\0.png\n", "data.train: line 2 of 'list.csv' names '\\x00.png', which is not in '.'"),
    ],
)
def test_mistakes_in_tables(flat, monkeypatch, content, message):
    monkeypatch.chdir(flat)
    (flat / "list.csv").write_text(content)
    assert worded(lambda: Folder(16, 0, root=".", train="list.csv")) == message


def test_lists_below_train_and_val_keep_their_classes(tmp_path):
    for name in ("train/dog/1.png", "train/cat/2.png", "val/cat/3.png"):
        paint(tmp_path / name)
    (tmp_path / "train.txt").write_text("train/dog/1.png\ntrain/cat/2.png\n")
    data = Folder(16, 0, root=str(tmp_path), train=str(tmp_path / "train.txt"))
    assert data.classes == ["cat", "dog"]
    assert data.split("validation").labels.tolist() == [0]


def test_lists_of_names_alone_are_found_below_whatever_their_ending(tmp_path):
    """As the lists of taming-transformers name FFHQ, 52535.png, and CelebA-HQ, imgHQ20126.npy."""
    for name in ("52000/52535.png", "00000/00001.png", "00000/00002.png", "a/twice.png", "b/twice.png"):
        paint(tmp_path / name)
    (tmp_path / "train.txt").write_text("52535.png\n00001.npy\n")
    (tmp_path / "val.txt").write_text("00002.png\n")
    lists = {"train": str(tmp_path / "train.txt"), "validation": str(tmp_path / "val.txt")}
    data = Folder(16, 0, root=str(tmp_path), labels=False, **lists)
    assert (names(data), names(data, "validation")) == (["52000/52535.png", "00000/00001.png"], ["00000/00002.png"])
    (tmp_path / "val.txt").write_text("twice.png\n")
    assert worded(lambda: Folder(16, 0, root=str(tmp_path), **lists)) == (
        f"data.validation: line 1 of '{tmp_path / 'val.txt'}' names 'twice.png', but 2 files in '{tmp_path}' have that "
        "name; give the path: 'a/twice.png' or 'b/twice.png'"
    )


def test_a_list_may_name_images_elsewhere(flat, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "x.png"
    paint(other, (77, 0, 0))
    (flat / "train.txt").write_text(f"{other}\n")
    split = Folder(16, 0, root=str(flat), train=str(flat / "train.txt")).split("train")
    assert red(split.item(0, 0)) == 77


def test_training_images_are_cropped_at_random_and_flipped_but_repeatably(tmp_path):
    ramp = np.tile(np.arange(64, dtype=np.uint8), (16, 1))
    for i in range(8):
        Image.fromarray(np.dstack([ramp] * 3)).save(tmp_path / f"{i}.png")
    make = lambda seed=0, **options: Folder(16, seed, root=str(tmp_path), validation_last=1, **options)  # noqa: E731
    train = make().split("train")
    rows = {
        tuple(((train.item(e, i).image[0, 0] + 1) * 127.5).round().int().tolist()) for e in range(8) for i in range(7)
    }
    firsts = {min(row) for row in rows}
    assert all(row in (tuple(range(f, f + 16)), tuple(range(f + 15, f - 1, -1))) for row in rows for f in [min(row)])
    assert len(firsts) > 20
    assert {row[0] < row[-1] for row in rows} == {True, False}
    again = make().split("train")
    assert torch.equal(train.item(5, 3).image, again.item(5, 3).image)
    assert any(not torch.equal(train.item(0, i).image, make(1).split("train").item(0, i).image) for i in range(3))
    centred = ((make().split("validation").item(0, 0).image[0, 0] + 1) * 127.5).round().int().tolist()
    assert centred == list(range(24, 40))
    plain = make(crop="center", flip=False).split("train")
    assert torch.equal(plain.item(0, 0).image, plain.item(9, 0).image)


def test_crop_boxes(tmp_path):
    ramp = np.tile(np.arange(64, dtype=np.uint8), (16, 1))
    Image.fromarray(np.dstack([ramp] * 3)).save(tmp_path / "0.png")
    Image.fromarray(np.dstack([ramp] * 3)).save(tmp_path / "1.png")
    data = Folder(16, 0, root=str(tmp_path), validation_last=1)
    assert data.split("validation").item(0, 0).crop_box.tolist() == [0, 24 / 64, 1, 40 / 64]
    for epoch in range(12):
        sample = data.split("train").item(epoch, 0)
        first, last = ((sample.image[0, 0, [0, -1]] + 1) * 127.5).round().tolist()
        left, right = (first, last + 1) if first < last else (first + 1, last)  # mirrored, right is below left
        assert sample.crop_box.tolist() == [0, left / 64, 1, right / 64]


def test_regions_colors_and_cv2_are_options(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (60, 50, 3), np.uint8)).save(tmp_path / f"{i}.png")
    make = lambda **options: Folder(16, 0, root=str(tmp_path), validation_last=1, **options)  # noqa: E731
    plain = make(crop="center", flip=False)
    for options in ({"crop": "resized"}, {"jitter": (0.5, 0.5, 0.5, 0.5)}, {"resize": "cv2"}):
        data = make(**{"crop": "center", "flip": False, **options})
        train, again = data.split("train"), make(**{"crop": "center", "flip": False, **options}).split("train")
        assert torch.equal(train.item(4, 1).image, again.item(4, 1).image)
        assert not torch.equal(train.item(4, 1).image, plain.split("train").item(4, 1).image)
        assert torch.equal(train.item(4, 1).image, train.item(5, 1).image) == ("resize" in options)
        assert train.item(4, 1).image.abs().max() <= 1
        assert train.fingerprint != plain.split("train").fingerprint
        still = data.split("validation").item(0, 0).image, plain.split("validation").item(0, 0).image
        assert torch.equal(*still) == ("resize" not in options)
    areas = [make(crop="resized", crop_area=(0.2, 0.3)).split("train").item(e, 0).crop_box for e in range(20)]
    assert all(0.18 < (b - t) * (right - left).abs() < 0.32 for t, left, b, right in areas)


def test_animations_are_refused_unless_their_first_frame_is_wanted(flat):
    frames = [Image.new("RGB", (20, 16), (each, 0, 0)) for each in (201, 9)]
    frames[0].save(flat / "05.png", save_all=True, append_images=frames[1:])
    assert red(Folder(16, 0, root=str(flat), validation_fraction=0).split("train").item(0, 5)) == 6
    first = Folder(16, 0, root=str(flat), validation_fraction=0, animated="first").split("train")
    assert red(first.item(0, 5)) == 201


def test_height_and_width(flat):
    assert Folder([24, 40], 0, root=str(flat)).split("train").item(0, 0).image.shape == (3, 24, 40)


def test_an_unreadable_image_is_replaced_by_the_next_and_named_once(flat, caplog):
    (flat / "03.png").write_bytes(b"broken")
    (flat / "04.png").write_bytes((flat / "05.png").read_bytes()[:60])
    split = Folder(16, 0, root=str(flat), validation_fraction=0, max_unreadable=0.05).split("train")
    with caplog.at_level(logging.WARNING, "vqf"):
        for _ in range(3):
            assert [red(split.item(0, i)) for i in (2, 3, 4, 5)] == [2, 5, 5, 5]
    assert [record.getMessage() for record in caplog.records] == [
        "data.root: cannot read '03.png' (not an image of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)); "
        "the next image takes its place",
        "data.root: cannot read '04.png' (image file is truncated); the next image takes its place",
    ]
    assert split.read_errors.flags.nonzero().flatten().tolist() == [3, 4]


def test_the_last_image_is_replaced_by_the_first(flat):
    (flat / "39.png").unlink()
    paint(flat / "39.png", size=(200, 200))
    split = Folder(16, 0, root=str(flat), validation_fraction=0, max_pixels=10_000).split("train")
    assert red(split.item(0, 39)) == 0


def test_a_file_that_vanishes_after_the_start_is_replaced(flat):
    split = Folder(16, 0, root=str(flat), validation_fraction=0).split("train")
    (flat / "07.png").unlink()
    assert red(split.item(0, 7)) == 8


@pytest.mark.parametrize(("limit", "allowed"), [(0.05, 2), (0.001, 1), (0.0, 0)])
def test_too_many_unreadable_images_stop_the_run(flat, limit, allowed):
    for i in range(allowed + 1):
        (flat / f"{2 * i + 10}.png").write_bytes(b"broken")
    split = Folder(16, 0, root=str(flat), validation_fraction=0, max_unreadable=limit).split("train")
    for i in range(allowed):
        assert red(split.item(0, 2 * i + 10)) == 2 * i + 11
    message = worded(lambda: split.item(0, 10 + 2 * allowed))
    assert message == (
        f"data.max_unreadable={limit:g}: {allowed + 1} of the 40 train images in '{flat}' cannot be read; the "
        f"last is "
        f"'{10 + 2 * allowed}.png' (not an image of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF))"
    )


def test_a_folder_of_which_nothing_can_be_read(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(b"")
    split = Folder(16, 0, root=str(tmp_path), validation_fraction=0, max_unreadable=1).split("train")
    assert "2 of the 2 train images" in worded(lambda: split.item(0, 0))
    assert worded(lambda: split.item(0, 0)) == f"data.root: none of the 2 train images in '{tmp_path}' can be read"


def test_the_fingerprint_follows_files_and_options(flat):
    def fingerprint(part="train", size=16, seed=0, **options):
        return Folder(size, seed, root=str(flat), validation_last=5, **options).split(part).fingerprint

    plain = {"crop": "center", "flip": False}
    before = fingerprint()
    different = [before, fingerprint("validation"), fingerprint(size=8), fingerprint(seed=1), fingerprint(**plain)]
    different += [fingerprint(flip=False), fingerprint(animated="first"), fingerprint("validation", resize="cv2")]
    assert fingerprint(**plain) == fingerprint(seed=1, **plain)
    assert fingerprint("validation") == fingerprint("validation", seed=1, **plain)
    paint(flat / "00.png", size=(90, 90))
    different.append(fingerprint())
    (flat / "00.png").rename(flat / "000.png")
    different.append(fingerprint())
    assert len(set(different)) == len(different)


def test_the_fingerprint_does_not_depend_on_where_the_folder_lies(flat, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy") / "images"
    shutil.copytree(flat, copy)
    first, second = (Folder(16, 0, root=str(root)).split("train").fingerprint for root in (flat, copy))
    assert first == second


def test_mistakes_are_worded(tmp_path, flat, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hint = "FFHQ: 70,000 faces at 1024 px, https://github.com/NVlabs/ffhq-dataset"
    assert worded(lambda: Folder(16, 0, root="data/ffhq", source_hint=hint)) == (
        "data.root: no folder 'data/ffhq' (FFHQ: 70,000 faces at 1024 px, https://github.com/NVlabs/ffhq-dataset); "
        "point data.root to it, or to any folder of images"
    )
    assert worded(lambda: Folder(16, 0, root="none")) == (
        "data.root: no folder 'none'; point data.root to a folder of images"
    )
    (tmp_path / "empty").mkdir()
    assert worded(lambda: Folder(16, 0, root="empty", extensions=(".png", ".jpg"))) == (
        "data.root: no images (.png, .jpg) in the folder 'empty'; point data.root to a folder of images"
    )
    assert worded(lambda: Folder(16, 0, root="00.png")) == (
        "data.root: '00.png' is a file, not a folder; point data.root to a folder of images"
    )
    (tmp_path / "list.txt").write_text("00.png\nmissing.png\n")
    assert worded(lambda: Folder(16, 0, root=".", train="list.txt")) == (
        "data.train: line 2 of 'list.txt' names 'missing.png', which is not in '.'"
    )
    assert worded(lambda: Folder(16, 0, root=".", validation="none.txt")) == (
        "data.validation: cannot read the list 'none.txt' (no such file or directory)"
    )
    assert worded(lambda: Folder(16, 0, root=".", validation_fraction=0).split("validation")) == (
        "data.root: no validation images among the 40 in '.'; see data.validation_fraction, "
        "data.validation_last and the lists data.train and data.validation"
    )
    assert worded(lambda: Folder(16, 0, root=".").split("test")) == "unknown split 'test'. Known: train, validation."


def test_the_root_has_no_default():
    assert "root: data 'folder'" in worded(lambda: build("data", {"name": "folder"}, image_size=16, seed=0)).replace(
        "data.root", "root"
    )


def test_it_is_built_from_a_config(flat):
    node = OmegaConf.create({"name": "folder", "root": str(flat), "extensions": [".png"]})
    assert len(build("data", node, image_size=16, seed=0).split("train")) > 30


def test_names_are_a_sequence():
    words = ["a/b.png", "", "straße/日本.jpg", "bad\udcff.png"]
    names = PackedStrings(words)
    assert list(names) == words
    assert names[-1] == words[-1]
    assert names[1:3] == words[1:3]
    with pytest.raises(IndexError):
        names[4]
