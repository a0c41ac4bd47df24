"""What a folder or list leaves out is counted in one line, in the run and in pipeline=check."""

import json
import logging

import pytest

from tests.data.packing import png
from tests.support.composing import compose
from vqf.data.folder import Folder
from vqf.data.pairs import Pairs
from vqf.errors import UserError
from vqf.pipelines.check import Check


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "vqf")


def put(path, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png() if content is None else content)


def images(folder, count=6):
    for i in range(count):
        put(folder / f"{i}.png", png((i, 0, 0)))


def test_the_endings_of_browsers_and_phones_are_read(tmp_path):
    for i, ending in enumerate(("jpg", "jfif", "jpe", "JPEG", "pjp", "pjpeg")):
        put(tmp_path / f"{i}.{ending}")
    assert len(Folder(16, 0, root=".", validation_fraction=0).split("train")) == 6


def test_files_with_other_endings_are_counted_by_ending(tmp_path, caplog):
    images(tmp_path / "p")
    for i in range(3):
        put(tmp_path / "p" / "deep" / f"{i}.AVIF")
    for name in ("a.txt", "b.txt", "README", ".DS_Store", ".hidden.png"):
        put(tmp_path / "p" / name)
    Folder(16, 0, root="p")
    line = (
        "data.root: 8 files (.avif 3, hidden 2, .txt 2, no ending 1) in 'p' are left out; data.extensions says which "
        "endings are images"
    )
    assert [record.getMessage() for record in caplog.records].count(line) == 1
    Check(compose("data=folder", "data.root=p", "image_size=16"), tmp_path / "run").run()
    assert line in json.loads((tmp_path / "run" / "check.json").read_text())["messages"]
    with pytest.raises(UserError, match=r"^data\.root: no images .* in the folder 'p/deep', only 3 files \(\.avif 3\)"):
        Folder(16, 0, root="p/deep")


def test_a_folder_that_is_linked_twice_is_counted_once_and_named(tmp_path, caplog):
    images(tmp_path / "p" / "a")
    (tmp_path / "p" / "b").symlink_to(tmp_path / "p" / "a")
    data = Folder(16, 0, root="p")
    assert len(data.partition.train) + len(data.partition.validation) == 6
    assert "1 links in 'p' lead to folders that are listed already, such as 'b'; their images count once" in caplog.text


HEADERS = ["path, label", "Path,Label", " LABEL ,path ", '"path", "label"', "\ufeffpath,label"]


@pytest.mark.parametrize("header", HEADERS)
def test_the_header_of_a_table_may_have_blanks_and_capitals(tmp_path, header):
    images(tmp_path / "p")
    order = (lambda i, word: f"{word}, {i}.png") if "LABEL" in header else (lambda i, word: f'"{i}.png", {word}')
    rows = [order(i, "cat" if i % 2 else "dog") for i in range(6)]
    (tmp_path / "l.csv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    data = Folder(16, 0, root="p", train="l.csv", validation="l.csv")
    assert data.classes == ["cat", "dog"]
    assert data.split("train").labels.tolist() == [1, 0] * 3


def test_columns_of_other_names_are_mentioned(tmp_path, caplog):
    images(tmp_path / "p", 1)
    (tmp_path / "l.csv").write_text("path,class,caption\n0.png,cat,a cat\n")
    assert Folder(16, 0, root="p", train="l.csv", validation="l.csv").classes == []
    assert (
        "data.train: columns of 'l.csv' that are not read: class, caption; a column named 'label' gives the classes"
    ) in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\na,b.png,cat\n", "data.train: line 2 of 'l.csv' has more cells than the first line; put a"),
        ("path,label,label\n", "data.train: the first line of 'l.csv' names the column 'label' twice"),
        ("path;label\n", r"data.train: the first line of 'l.csv' .*; separate columns by commas"),
    ],
)
def test_a_table_that_would_lose_labels_is_refused(tmp_path, content, message):
    images(tmp_path / "p", 1)
    (tmp_path / "l.csv").write_text(content)
    with pytest.raises(UserError, match=f"^{message}"):
        Folder(16, 0, root="p", train="l.csv")


def test_empty_cells_and_lines_at_the_end_lose_nothing(tmp_path):
    images(tmp_path / "p", 2)
    (tmp_path / "l.csv").write_text("path,label\n0.png,cat,\n1.png,dog,,\n\n,\n".replace("\n,\n", "\n"))
    assert Folder(16, 0, root="p", train="l.csv", validation="l.csv").classes == ["cat", "dog"]


def test_paths_that_are_found_by_their_names_alone_are_counted(tmp_path, caplog):
    images(tmp_path / "p" / "2019")
    (tmp_path / "l.txt").write_text("2019/0.png\n1.jpg\n2.png\n")
    Folder(16, 0, root="p", train="l.txt")
    assert (
        "data.train: 2 of the 3 paths in 'l.txt' are found by their file names alone, such as '1.jpg' as '2019/1.png'"
    ) in caplog.text


def test_maps_without_image_and_files_that_are_no_maps_are_counted(tmp_path, caplog):
    images(tmp_path / "images", 3)
    for name in ("0_d.png", "1_d.png", "2_d.png", "7_d.png", "0_n.png", "0_d.npy"):
        put(tmp_path / "conditions" / name)
    Pairs(16, 0, root=".", suffix="_d")
    assert "data.conditions: 1 files (.npy 1) in 'conditions' are left out" in caplog.text
    assert "data.conditions: 1 of the 4 maps in 'conditions' belong to no image, such as '7_d.png'" in caplog.text
    assert "data.suffix=_d: 1 images in 'conditions' are no maps" in caplog.text and "such as '0_n.png'" in caplog.text
