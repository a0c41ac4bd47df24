"""Which pictures a folder holds, and which of them are for training and which for validation."""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from vqf.errors import UserError
from vqf.randomness import share

log = logging.getLogger("vqf")

VALIDATION_FOLDERS = ("val", "validation")


class File(NamedTuple):
    """A picture: its path below the root, with slashes, and its length in bytes, -1 where there is none."""

    name: str
    size: int


@dataclass(frozen=True)
class Division:
    """The two parts of a folder, and how deep below the root the folders that name classes lie."""

    train: list[File]
    validation: list[File]
    depth: int = 0

    @property
    def classes(self) -> list[str]:
        """The names of the class folders, sorted; none unless every picture lies in one and there are two or more."""
        names = [class_of(file.name, self.depth) for file in (*self.train, *self.validation)]
        found = {name for name in names if name is not None}
        if found and None in names:
            stray = (*self.train, *self.validation)[names.index(None)].name
            log.warning(f"data.root: no labels, because '{stray}' lies in no class folder, as other pictures do")
            return []
        return sorted(found) if len(found) > 1 else []


class Names(Sequence[str]):
    """Many strings in two arrays: worker processes share them, where a list would be copied into each of them."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


def class_of(name: str, depth: int) -> str | None:
    """Return the folder of a path that names its class, if there is one."""
    folders = name.split("/")[:-1]
    return folders[depth] if len(folders) > depth and not os.path.isabs(name) else None


def scan(root: Path, extensions: Sequence[str]) -> list[File]:
    """List the pictures below a folder, sorted by path; links are followed, hidden files and folders left out.

    Raises:
        UserError: If a folder cannot be listed.
    """
    wanted, seen, found = tuple(each.lower() for each in extensions), set(), []
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_not_listed):
        real = os.path.realpath(folder)
        subfolders[:] = sorted(each for each in subfolders if not each.startswith(".")) if real not in seen else []
        names = [each for each in names if each.lower().endswith(wanted) and not each.startswith(".")]
        if real not in seen:  # links may lead in circles
            seen.add(real)
            found += [_file(root, os.path.join(folder, each)) for each in names]
    return sorted(found)


def read_list(path: str, root: Path, option: str) -> list[File]:
    """Read a text file that names a picture per line, its path relative to `root` or absolute.

    Raises:
        UserError: If the list, or a picture that it names, is not there; `option` says where the list was named.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"{option}: cannot read the list '{path}' ({reason.lower()})") from error
    files = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            files.append(_file(root, os.path.join(root, line.strip())))
            if files[-1].size < 0:
                raise UserError(f"{option}: line {number} of '{path}' names '{line.strip()}', which is not in '{root}'")
    return files


def divide_by_lists(root: Path, train: str | None, validation: str | None, extensions: Sequence[str]) -> Division:
    """Take the parts from lists; a part without one is every other picture below the root."""
    parts = [
        None if path is None else read_list(path, root, f"data.{option}")
        for option, path in (("train", train), ("validation", validation))
    ]
    if None in parts:
        listed = {file.name for part in parts for file in part or ()}
        others = [file for file in scan(root, extensions) if file.name not in listed]
        parts = [others if part is None else part for part in parts]
    first, second = (part or [] for part in parts)
    if both := {file.name for file in first} & {file.name for file in second}:
        log.warning(f"data.validation: {len(both)} of its pictures are trained on too, such as '{min(both)}'")
    return Division(first, second)


def divide(files: list[File], portion: float, last: int | None) -> Division:
    """Divide pictures: the last so many, or as folders named train and val do, or by a hash of each path.

    A portion of 1 is everything, whatever the folders are called.
    """
    if last is not None:
        return Division(files[: len(files) - last], files[max(len(files) - last, 0) :])
    if portion == 1:
        return Division([], files)
    top = {file.name.split("/")[0] for file in files if "/" in file.name}
    name = next((each for each in VALIDATION_FOLDERS if each in top), None)
    if name and "train" in top:
        train, validation = ([file for file in files if file.name.startswith(f"{each}/")] for each in ("train", name))
        return Division(train, validation, depth=1)
    return _divide_by_hash(files, portion)


def _divide_by_hash(files: list[File], portion: float) -> Division:
    places = [share(file.name) for file in files]
    if len(files) > 1 and portion > 0:  # a small folder keeps at least one picture on each side
        ranked = sorted(places)
        portion = min(max(portion, ranked[1]), ranked[-1])
    sides: tuple[list[File], list[File]] = ([], [])
    for file, place in zip(files, places, strict=True):
        sides[place < portion].append(file)
    return Division(*sides)


def _file(root: Path, path: str) -> File:
    name = os.path.relpath(path, root)
    name = os.path.abspath(path) if name.startswith(os.pardir + os.sep) else name
    try:
        size = os.stat(path).st_size
    except OSError:
        size = -1
    return File(name.replace(os.sep, "/"), size)


def _not_listed(error: OSError) -> None:
    raise UserError(f"data.root: cannot list the folder '{error.filename}' ({(error.strerror or '').lower()})")
