"""Which images a folder holds, and which of them are for training and which for validation."""

import csv
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vqf.data.files.packed import File, PackedFiles, gc_paused
from vqf.data.labels import parse
from vqf.errors import UserError
from vqf.seeding import hash_fraction

log = logging.getLogger("vqf")

TRAINING_FOLDERS = ("train", "training")  # in any case, as the following
VALIDATION_FOLDERS = ("val", "valid", "validation", "test", "testing")  # the first that is there; others are left out

ListRow = tuple[int, str, int | str | None]  # of a list: number of the line, path, label


@dataclass(frozen=True)
class TrainValidationSplit:
    """The two parts of a folder, and how deep below the root the folders that name classes lie."""

    train: Sequence[File]
    validation: Sequence[File]
    class_depth: int | None = 0  # None where labels are what a table says

    def pack(self) -> "TrainValidationSplit":
        """Return the same in arrays."""
        return replace(self, train=PackedFiles(self.train), validation=PackedFiles(self.validation))

    def label(self, file: File) -> int | str | None:
        """Return what a table says of an image, or the folder that names its class; None if there is neither."""
        if self.class_depth is None:
            return file.label
        folders = file.name.split("/")[:-1]
        return folders[self.class_depth] if len(folders) > self.class_depth and not os.path.isabs(file.name) else None

    @property
    def labels(self) -> set[int | str]:
        """The labels; none unless every image has one and there are two or more."""
        found: set[int | str] = set()
        stray = None
        for file in (*self.train, *self.validation):
            if (label := self.label(file)) is not None:
                found.add(label)
            else:
                stray = stray or file.name
        if found and stray:
            why = (
                "lies in no class folder, as other images do" if self.class_depth is not None else "has none in a table"
            )
            log.warning(f"data.root: no labels, because '{stray}' {why}")
            return set()
        return found if len(found) > 1 else set()


def scan(root: Path, extensions: Sequence[str]) -> list[File]:
    """List the images below a folder, sorted by path; links are followed, hidden files and folders left out.

    Raises:
        UserError: If a folder cannot be listed.
    """
    wanted = tuple(each.lower() for each in extensions)
    with gc_paused():
        return sorted(_walk(root, wanted))


def _walk(root: Path, wanted: tuple[str, ...]) -> Iterator[File]:
    seen: set[str] = set()
    folders = [("", os.fspath(root))]
    while folders:
        below, folder = folders.pop()
        real = os.path.realpath(folder)
        if real in seen:  # links may lead in circles
            continue
        seen.add(real)
        entries = _entries(folder)
        inside = sorted(entry.name for entry in entries if _is_folder(entry))
        folders += [(f"{below}{name}/", os.path.join(folder, name)) for name in reversed(inside)]
        for entry in entries:
            if entry.name.lower().endswith(wanted) and not _is_folder(entry):
                yield File(f"{below}{entry.name}", _size(entry))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        what = f"'{error.filename}' ({(error.strerror or '').lower()})"
        raise UserError(f"data.root: cannot list the folder {what}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def read_list(path: str, root: Path, option: str, extensions: Sequence[str]) -> list[File]:
    """Read a text file that names an image per line, its path relative to `root` or absolute, or a table of them.

    A line may also be the name of an image alone, whatever its ending, if it is the only one below `root`.

    Raises:
        UserError: If the list, or an image that it names, is not there; `option` says where the list was named.
    """
    try:
        with Path(path).expanduser().open(encoding="utf-8-sig", newline="") as file:
            table = path.lower().endswith(".csv")
            rows = list(_csv_rows(file, path, option) if table else _text_rows(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"{option}: cannot read the list '{path}' ({reason.lower()})") from error
    files: list[File] = []
    below: Mapping[str, File | None] | None = None
    for number, name, label in rows:
        found: File | None = _stat_file(root, os.path.join(root, name))
        if found is None or found.size < 0:
            below = _by_stem(scan(root, extensions)) if below is None else below
            found = below.get(_stem(name))
        if found is None:
            raise UserError(f"{option}: line {number} of '{path}' names '{name}', which is not in '{root}'")
        files.append(found._replace(label=label))
    return files


def split_by_lists(
    root: Path, train: str | None, validation: str | None, extensions: Sequence[str]
) -> TrainValidationSplit:
    """Take the parts from lists; a part without one is every other image below the root."""
    parts = [
        None if path is None else read_list(path, root, f"data.{option}", extensions)
        for option, path in (("train", train), ("validation", validation))
    ]
    if None in parts:
        listed = {file.name for part in parts for file in part or ()}
        others = [file for file in scan(root, extensions) if file.name not in listed]
        parts = [others if part is None else part for part in parts]
    first, second = (part or [] for part in parts)
    if both := {file.name for file in first} & {file.name for file in second}:
        log.warning(f"data.validation: {len(both)} of its images are trained on too, such as '{min(both)}'")
    return TrainValidationSplit(first, second, _class_depth([*first, *second]))


def split_files(files: list[File], validation_fraction: float, last: int | None) -> TrainValidationSplit:
    """Divide images: the last so many, or as folders named train and val do, or by a hash of each path.

    A portion of 1 is everything, whatever the folders are called. What is made of the folders' names is logged.
    """
    if last is not None:
        first = max(len(files) - last, 0)
        return TrainValidationSplit(files[:first], files[first:])
    if validation_fraction == 1:
        return TrainValidationSplit([], files)
    top = {file.name.split("/")[0] for file in files if "/" in file.name}
    training, held_out = (_first_match(top, names) for names in (TRAINING_FOLDERS, VALIDATION_FOLDERS))
    if training and held_out:
        return _split_by_folders(files, training, held_out)
    if training and all(file.name.startswith(f"{training}/") for file in files):
        log.info(f"data.root: all images are in '{training}'; a share of them is held out")
        return replace(_split_by_hash(files, validation_fraction), class_depth=1)
    if found := training or held_out:
        log.warning(
            f"data.root: '{found}' is taken for a class like any other folder, for it has no counterpart "
            f"({', '.join(VALIDATION_FOLDERS if training else TRAINING_FOLDERS)}) beside it"
        )
    return _split_by_hash(files, validation_fraction)


def _first_match(folders: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the folder that has the first of some names that one has, in any case."""
    found = {folder.lower(): folder for folder in sorted(folders)}
    return next((found[name] for name in names if name in found), None)


def _split_by_folders(files: list[File], training: str, held_out: str) -> TrainValidationSplit:
    train, validation = ([file for file in files if file.name.startswith(f"{each}/")] for each in (training, held_out))
    left = len(files) - len(train) - len(validation)
    beside = f"; {left} images beside them are left out" if left else ""
    log.info(f"data.root: '{training}' is for training, '{held_out}' for validation{beside}")
    return TrainValidationSplit(train, validation, class_depth=1)


def _class_depth(files: Sequence[File]) -> int | None:
    """Return how deep class folders lie: below train and val, where every image lies in one of them."""
    if any(file.label is not None for file in files):
        return None
    top = {file.name.split("/")[0].lower() for file in files}
    return int(bool(top) and top <= {*TRAINING_FOLDERS, *VALIDATION_FOLDERS})


def _split_by_hash(files: list[File], portion: float) -> TrainValidationSplit:
    places = [hash_fraction(file.name) for file in files]
    if len(files) > 1 and portion > 0:  # a small folder keeps at least one image on each side
        ranked = sorted(places)
        portion = min(max(portion, ranked[1]), ranked[-1])
    sides: tuple[list[File], list[File]] = ([], [])
    for file, place in zip(files, places, strict=True):
        sides[place < portion].append(file)
    return TrainValidationSplit(*sides)


def _text_rows(file: Iterable[str]) -> Iterator[ListRow]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, line.strip(), None


def _csv_rows(file: Iterable[str], path: str, option: str) -> Iterator[ListRow]:
    reader = csv.DictReader(file)
    columns = reader.fieldnames or []
    if "path" not in columns:
        raise UserError(f"{option}: the first line of '{path}' names no column 'path' (it has: {', '.join(columns)})")
    for row in reader:
        label = (row.get("label") or "").strip()
        if not (row["path"] or "").strip():
            raise UserError(f"{option}: line {reader.line_num} of '{path}' has no path")
        if "label" in columns and not label:
            raise UserError(f"{option}: line {reader.line_num} of '{path}' has no label")
        yield reader.line_num, row["path"].strip(), parse(label) if label else None


def _by_stem(files: Iterable[File]) -> dict[str, File | None]:
    """Find images by their names without folder and ending; None where several have the same."""
    found: dict[str, File | None] = {}
    for file in files:
        stem = _stem(file.name.rpartition("/")[2])
        found[stem] = None if stem in found else file
    return found


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _stat_file(root: Path, path: str) -> File:
    name = os.path.relpath(path, root)
    name = os.path.abspath(path) if name.startswith(os.pardir + os.sep) else name
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError):  # a list may name anything
        size = -1
    return File(name.replace(os.sep, "/"), size)
