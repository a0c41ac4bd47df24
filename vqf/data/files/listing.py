"""List image files."""

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from vqf.data.files.packed import File, gc_paused
from vqf.data.labels import int_or_str
from vqf.errors import UserError
from vqf.file_kinds import check_regular

ListRow = tuple[int, str, int | str | None]  # line number, path, label


def scan(root: Path, extensions: Sequence[str]) -> list[File]:
    """List images below a folder by path; follow links, skip hidden files.

    Raises:
        UserError: If a folder cannot be listed.
    """
    lowercase = tuple(extension.lower() for extension in extensions)
    with gc_paused():
        return sorted(_walk(root, lowercase))


def read_list(path: str, root: Path, option: str, extensions: Sequence[str]) -> list[File]:
    """Read a text file with an image path per line, or a CSV table with columns `path` and perhaps `label`.

    Paths are relative to `root`, or absolute; a unique file name is enough.

    Raises:
        UserError: If a file is missing or invalid.
    """
    files: list[File] = []
    by_stem: Mapping[str, File | None] | None = None
    for number, name, label in _read_rows(path, option):
        file: File | None = _stat_file(root, os.path.join(root, name))
        if file is None or file.size < 0:
            if by_stem is None:  # only lists of bare names need the scan
                by_stem = _unique_by_stem(scan(root, extensions))
            file = by_stem.get(_stem(name))
        if file is None:
            raise UserError(f"{option}: line {number} of '{path}' names '{name}', which is not in '{root}'")
        files.append(file._replace(label=label))
    return files


def _walk(root: Path, extensions: tuple[str, ...]) -> Iterator[File]:
    visited: set[str] = set()
    folders = [("", os.fspath(root))]
    while folders:
        prefix, folder = folders.pop()
        real = os.path.realpath(folder)
        if real in visited:  # links may form a cycle
            continue
        visited.add(real)
        entries = _entries(folder)
        subfolders = sorted(entry.name for entry in entries if _is_folder(entry))
        folders += [(f"{prefix}{name}/", os.path.join(folder, name)) for name in reversed(subfolders)]
        for entry in entries:
            if entry.name.lower().endswith(extensions) and not _is_folder(entry):
                yield File(f"{prefix}{entry.name}", _size(entry))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        reason = f"'{error.filename}' ({(error.strerror or '').lower()})"
        raise UserError(f"data.root: cannot list the folder {reason}") from error


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


def _read_rows(path: str, option: str) -> list[ListRow]:
    try:
        check_regular(Path(path).expanduser())
        with Path(path).expanduser().open(encoding="utf-8-sig", newline="") as file:
            is_table = path.lower().endswith(".csv")
            return list(_csv_rows(file, path, option) if is_table else _text_rows(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"{option}: cannot read the list '{path}' ({reason.lower()})") from error


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
        yield reader.line_num, row["path"].strip(), int_or_str(label) if label else None


def _unique_by_stem(files: Iterable[File]) -> dict[str, File | None]:
    by_stem: dict[str, File | None] = {}
    for file in files:
        stem = _stem(file.name.rpartition("/")[2])
        by_stem[stem] = None if stem in by_stem else file
    return by_stem


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _stat_file(root: Path, path: str) -> File:
    name = os.path.relpath(path, root)
    name = os.path.abspath(path) if name.startswith(os.pardir + os.sep) else name
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError):  # ValueError: a list may hold any string, such as one with a null character
        size = -1
    return File(name.replace(os.sep, "/"), size)
