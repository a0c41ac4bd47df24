"""A number that names a class keeps its value, wherever the class is named."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.packing import pack, png, shard
from vqf.data.folder import Folder
from vqf.data.labels import MAX_CLASSES, class_numbers
from vqf.data.shards import Shards
from vqf.errors import UserError
from vqf.models.class_labels import class_index


def folder_of_classes(root, names):
    for name in names:
        for i in range(2):
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / f"{i}.png").write_bytes(png((i, 0, 0)))
    return root


def label_by_name(split):
    return {name.split("/")[0]: label for name, label in zip(split.names, split.labels.tolist(), strict=True)}


def test_folders_lists_and_shards_with_the_same_numbers_have_the_same_classes(tmp_path):
    numbers = [str(i) for i in range(12)]
    root = folder_of_classes(tmp_path / "images", numbers)
    table = tmp_path / "list.csv"
    table.write_text("path,label\n" + "".join(f"{name}/{i}.png,{name}\n" for name in numbers for i in range(2)))
    shard(tmp_path / "shards" / "train-0.tar", range(12), cls=lambda red: f"{red}\n")
    shard(tmp_path / "more" / "train-0.tar", range(12), json=lambda red: json.dumps({"kind": float(red)}))
    sources = [
        Folder(16, 0, root=str(root), validation_fraction=0),
        Folder(16, 0, root=str(root), train=str(table), validation=str(table)),
        Shards(16, 0, root=str(tmp_path / "shards")),
        Shards(16, 0, root=str(tmp_path / "more"), label_key="kind"),
    ]
    assert [source.classes for source in sources] == [numbers] * 4
    for source in sources[:2]:
        assert label_by_name(source.split("train")) == {name: int(name) for name in numbers}
    for source in sources[2:]:
        assert source.split("train").labels.tolist() == list(range(12))
    assert [class_index(name, numbers) for name in numbers] == [class_index(int(name), numbers) for name in numbers]


@pytest.mark.parametrize("spelling", ["{:d}", "{:03d}"])
def test_numbers_with_a_gap_keep_their_values_and_a_line_counts_the_empty_classes(tmp_path, caplog, spelling):
    names = [spelling.format(i) for i in (1, 2, 10, 12)]
    root = folder_of_classes(tmp_path, names)
    caplog.set_level(logging.INFO, "vqf")
    data = Folder(16, 0, root=str(root), validation_fraction=0)
    assert label_by_name(data.split("train")) == {name: int(name) for name in names}
    assert [data.classes[int(name)] for name in names] == names
    assert len(data.classes) == 13
    assert (
        "data.numeric_labels=index: the labels are whole numbers, which are the class numbers: 9 of the 13 classes "
        "have no images (0, 3, 4, 5, 6, ...); data.numeric_labels=name numbers the others in order"
    ) in caplog.text
    dense = Folder(16, 0, root=str(root), validation_fraction=0, numeric_labels="name")
    assert dense.classes == names
    assert label_by_name(dense.split("train")) == {name: i for i, name in enumerate(names)}
    assert dense.split("train").fingerprint != data.split("train").fingerprint


def test_dates_of_eight_digits_are_too_large_for_class_numbers(tmp_path, caplog):
    root = folder_of_classes(tmp_path, ["20190412", "20180101", "3000000"])
    caplog.set_level(logging.INFO, "vqf")
    data = Folder(16, 0, root=str(root), validation_fraction=0)
    assert data.classes == ["3000000", "20180101", "20190412"]
    assert "20190412 is too large for a class number: the 3 classes are numbered in order" in caplog.text


def test_two_spellings_of_a_number_are_one_class_and_a_line_says_so(tmp_path, caplog):
    root = folder_of_classes(tmp_path, ["0", "1", "01"])
    caplog.set_level(logging.INFO, "vqf")
    assert len(Folder(16, 0, root=str(root), validation_fraction=0).classes) == 2
    assert "1 classes have labels of several spellings, such as '01' and '1'; data.numeric_labels=name" in caplog.text
    assert len(Folder(16, 0, root=str(root), validation_fraction=0, numeric_labels="name").classes) == 3


def test_the_fingerprint_follows_the_numbering_of_numeric_folders_and_of_no_others(tmp_path):
    def fingerprint(names, **options):
        root = folder_of_classes(tmp_path / "-".join(names), names)
        return Folder(16, 0, root=str(root), validation_fraction=0, **options).split("train").fingerprint

    numeric, words = ["0", "2"], ["ant", "bee"]
    assert fingerprint(numeric) != fingerprint(numeric, labels=False)
    assert fingerprint(numeric) != fingerprint(numeric, numeric_labels="name")
    assert fingerprint(words) == fingerprint(words, numeric_labels="name")


@given(st.sets(st.integers(0, 60) | st.sampled_from([10**7, "a", "b", "10a", "-1", "²"]), min_size=1))
def test_every_label_has_a_class_of_its_own_and_numbers_keep_their_order(labels):
    classes, numbers = class_numbers(labels)
    assert len({numbers[label] for label in labels}) == len(labels)
    assert all(classes[numbers[label]] == str(label) for label in labels)
    ordered = sorted(label for label in labels if isinstance(label, int))
    assert [numbers[label] for label in ordered] == sorted(numbers[label] for label in ordered)
    if len(ordered) == len(labels) and ordered[-1] < MAX_CLASSES:
        assert [numbers[label] for label in ordered] == ordered


def test_a_single_class_is_none_and_a_line_says_so(tmp_path, caplog):
    root = folder_of_classes(tmp_path, ["cat"])
    caplog.set_level(logging.INFO, "vqf")
    assert Folder(16, 0, root=str(root)).classes == []
    assert "data.root: no labels, because all images have the same one, 'cat'" in caplog.text


def test_shards_of_which_only_one_split_has_labels(tmp_path, caplog):
    shard(tmp_path / "train-0.tar", range(4), cls=str)
    pack(tmp_path / "validation-0.tar", [("a.png", png())])
    assert Shards(16, 0, root=str(tmp_path)).classes == []
    assert "no labels, because the validation images have none, unlike the train images" in caplog.text


def test_a_manifest_with_too_few_names_is_mentioned(tmp_path, caplog):
    shard(tmp_path / "train-0.tar", range(4), cls=str)
    (tmp_path / "manifest.json").write_text('{"classes": ["ant", "bee"]}')
    caplog.set_level(logging.INFO, "vqf")
    assert Shards(16, 0, root=str(tmp_path)).classes == ["0", "1", "2", "3"]
    assert "names 2 classes, but there are 4: its names are not used" in caplog.text


def test_a_name_is_looked_for_before_a_position():
    assert class_index("b", ["a", "b"]) == class_index(1, ["a", "b"]) == class_index("1", ["a", "b"]) == 1
    assert class_index(2, ["a", "b", "07", "2"]) == 3
    assert class_index(7, ["a", "b", "07", "2"]) == class_index("07", ["a", "b", "07", "2"]) == 2
    for label in ("²", "-1", 9, "c"):
        with pytest.raises(UserError, match=f"label={label}: unknown class"):
            class_index(label, ["a", "b"])


def test_one_line_tells_a_name_from_a_position(caplog):
    caplog.set_level(logging.INFO, "vqf")
    classes = ["1", "2", "3"]
    assert [class_index(label, classes) for label in (2, "2", 2)] == [1, 1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "label=2: draws the class named '2', which has index 1; the class with index 2 is '3', label=3 draws it"
    ]
