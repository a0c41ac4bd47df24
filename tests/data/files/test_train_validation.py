import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqf.data.files.packed import File
from vqf.data.files.train_validation import TrainValidationSplit, split_by_lists, split_files

names = st.text("ab01/.é", min_size=1, max_size=6).map(lambda text: "/".join(filter(None, text.split("/"))) or "x")
folders = st.sampled_from(["", "train/", "Training/", "val/", "validation/", "test/", "Valid/"])
TRAINING, HELD_OUT = ("train", "training"), ("val", "valid", "validation", "test", "testing")
paths = st.builds(lambda folder, name: folder + name, folders, names)
listings = st.lists(paths, min_size=1, max_size=30, unique=True).map(lambda found: sorted(File(n, 1) for n in found))
shares = st.floats(0, 1)


def top(file):
    return file.name.split("/")[0] if "/" in file.name else None


@given(listings, shares, st.none() | st.integers(0, 40))
def test_splits_are_disjoint_and_lose_only_images_beside_train_and_val(files, share, last):
    partition = split_files(files, share, last)
    together = [*partition.train, *partition.validation]
    assert len(set(together)) == len(together)
    tops = {top(file).lower(): top(file) for file in files if top(file)}
    first = [next((tops[name] for name in names if name in tops), None) for names in (TRAINING, HELD_OUT)]
    lost = set(files) - set(together)
    if last is None and share < 1 and all(first):
        assert [{top(file) for file in part} for part in (partition.train, partition.validation)] == [
            {f} for f in first
        ]
        assert not {top(file) for file in lost} & {*first}
    else:
        assert not lost
    assert partition.train == sorted(partition.train)
    assert partition.validation == sorted(partition.validation)


@given(listings, st.integers(0, 40))
def test_the_last_are_the_last(files, last):
    partition = split_files(files, 0.5, last)
    assert partition.train + partition.validation == files
    assert len(partition.validation) == min(last, len(files))


flat = st.lists(names, min_size=1, max_size=60, unique=True).map(lambda found: sorted(File(f"x/{n}", 1) for n in found))


@given(flat, flat, st.floats(0.05, 0.95))
def test_adding_images_moves_none_to_the_other_split_unless_one_was_empty(files, more, share):
    before, after = split_files(files, share, None), split_files(sorted({*files, *more}), share, None)
    moved = (set(before.train) & set(after.validation)) | (set(before.validation) & set(after.train))
    assert len(moved) <= 1  # the one that had to be on a side which would have been empty
    if len(before.train) > 1 and len(before.validation) > 1:
        assert not moved


@given(flat, shares)
def test_neither_split_is_empty_unless_the_fraction_says_so(files, share):
    partition = split_files(files, share, None)
    if len(files) > 1 and 0 < share < 1:
        assert partition.train and partition.validation
    assert bool(partition.validation) == (share > 0) or len(files) == 1


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_fraction_is_kept(share):
    partition = split_files([File(f"{i}.png", 1) for i in range(20_000)], share, None)
    assert abs(len(partition.validation) / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5


@given(st.sets(st.integers(0, 19)))
def test_a_split_without_a_list_gets_all_other_images(tmp_path_factory, listed):
    root = tmp_path_factory.getbasetemp() / "listed"
    root.mkdir(exist_ok=True)
    for i in range(20):
        (root / f"{i:02}.png").touch()
    (root / "list.txt").write_text("".join(f"{i:02}.png\n" for i in sorted(listed, reverse=True)))
    for option in ("train", "validation"):
        lists = {"train": None, "validation": None, option: str(root / "list.txt")}
        partition = split_by_lists(root, **lists, extensions=[".png"])
        named, rest = partition.train, partition.validation
        named, rest = (named, rest) if option == "train" else (rest, named)
        assert [file.name for file in named] == [f"{i:02}.png" for i in sorted(listed, reverse=True)]
        assert [file.name for file in rest] == [f"{i:02}.png" for i in range(20) if i not in listed]


@pytest.mark.parametrize(("depth", "expected"), [(0, {"train"}), (1, {"cat", "dog"}), (2, set()), (None, set())])
def test_which_folder_names_the_class(depth, expected):
    partition = TrainValidationSplit([File("train/cat/1.png", 1), File("train/dog/2.png", 1)], [], depth)
    assert {partition.label(file) for file in partition.train} - {None} == expected
    assert partition.labels == (expected if len(expected) > 1 else set())


LAYOUTS = {
    "train and val": (["train", "val"], "train", "val", "'train' is for training, 'val' for validation"),
    "in any case": (["Train", "VAL"], "Train", "VAL", "'Train' is for training, 'VAL' for validation"),
    "valid": (["train", "valid"], "train", "valid", "'train' is for training, 'valid' for validation"),
    "test": (["train", "test"], "train", "test", "'train' is for training, 'test' for validation"),
    "of ADE20K": (["training", "validation"], "training", "validation", "'training' is for training, 'validation' for"),
    "all three": (
        ["train", "val", "test"],
        "train",
        "val",
        "'train' is for training, 'val' for validation; 4 images beside them are left out "
        "(the lists data.train and data.validation can name them)",
    ),
    "train alone": (["train"], "train", "train", "all images are in 'train'; a fraction of them is held out"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_names_decide_the_split_and_subfolders_the_classes(layout, caplog):
    folders, train, validation, words = LAYOUTS[layout]
    caplog.set_level("INFO", "vqf")
    files = sorted(File(f"{folder}/{kind}/{i}.png", 1) for folder in folders for kind in ("ant", "bee") for i in (1, 2))
    partition = split_files(files, 0.3, None)
    assert {file.name.split("/")[0] for file in partition.train} == {train}
    assert {file.name.split("/")[0] for file in partition.validation} == {validation}
    assert partition.labels == {"ant", "bee"}
    (record,) = caplog.records
    assert words in record.getMessage()


@pytest.mark.parametrize(("folders", "named"), [(["test", "valid"], "valid"), (["train", "ant"], "train")])
def test_train_without_val_is_a_class_folder_with_a_warning(folders, named, caplog):
    partition = split_files(sorted(File(f"{folder}/{i}.png", 1) for folder in folders for i in range(4)), 0.3, None)
    assert partition.labels == {*folders}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"'{named}' counts as a class folder" in record.getMessage()


def test_lists_below_folders_of_any_of_these_names_have_the_classes_below_them(tmp_path):
    for name in ("Training/ant/1.png", "Training/bee/2.png", "test/bee/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "held.txt").write_text("test/bee/3.png\n")
    partition = split_by_lists(tmp_path, None, str(tmp_path / "held.txt"), [".png"])
    assert partition.labels == {"ant", "bee"}


def test_a_packed_split_is_the_same(tmp_path):
    files = [File("train/é/1.png", 1), File("train/é/bad\udcff.png", -1), File("b.png", 2**40)]
    for partition in (
        TrainValidationSplit(files[:2], files[2:], 1),
        TrainValidationSplit([File("a", 1, "cat"), File("b", 2, 7)], [], None),
    ):
        packed = partition.pack()
        for ours, theirs in ((packed.train, partition.train), (packed.validation, partition.validation)):
            assert list(ours) == theirs == ours[:] == [ours[i] for i in range(len(theirs))]
        assert packed.labels == partition.labels
