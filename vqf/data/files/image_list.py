"""Read lists of images: text files and tables."""

import csv
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from vqf.data.files.listing import scan
from vqf.data.files.packed import File
from vqf.data.labels import int_or_str
from vqf.errors import UserError
from vqf.file_kinds import check_regular

log = logging.getLogger("vqf")

COLUMNS = ("path", "label")

ListRow = tuple[int, str, int | str | None]  # line number, path, label


def read_list(path: str, root: Path, option: str, extensions: Sequence[str]) -> list[File]:
    """Read a text file with an image path per line, or a CSV table with columns `path` and perhaps `label`.

    Paths are relative to `root`, or absolute; a unique file name is enough.

    Raises:
        UserError: If a file is missing or invalid.
    """
    files: list[File] = []
    by_stem: Mapping[str, list[File]] | None = None
    by_name: list[tuple[str, str]] = []  # paths that are found by their file names alone
    for number, name, label in _read_rows(path, option):
        file = _stat_file(root, os.path.join(root, name))
        if file.size < 0:
            if by_stem is None:  # only lists of bare names need the scan
                by_stem = _by_stem(scan(root, extensions).files)
            problem = f"{option}: line {number} of '{path}' names '{name}'"
            file = _only_match(by_stem.get(_stem(name), []), problem, root)
            by_name.append((name, file.name))
        files.append(file._replace(label=label))
    if by_name:
        log.info(
            f"{option}: {len(by_name)} of the {len(files)} paths in '{path}' are found by their file names alone, such "
            f"as '{by_name[0][0]}' as '{by_name[0][1]}'"
        )
    return files


def _only_match(matches: Sequence[File], problem: str, root: Path) -> File:
    if not matches:
        raise UserError(f"{problem}, which is not in '{root}'")
    if len(matches) > 1:
        names = " or ".join(f"'{file.name}'" for file in matches[:2])
        raise UserError(f"{problem}, but {len(matches)} files in '{root}' have that name; give the path: {names}")
    return matches[0]


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
    reader = csv.reader(file, skipinitialspace=True)
    columns = [name.strip().lower() for name in next(reader, [])]
    _check_columns(columns, path, option)
    for cells in reader:
        where = f"{option}: line {reader.line_num} of '{path}'"
        if not any(cells):  # an empty line
            continue
        if any(cell.strip() for cell in cells[len(columns) :]):
            raise UserError(f"{where} has more cells than the first line; put a path or label with a comma in quotes")
        row = dict(zip(columns, (cell.strip() for cell in cells), strict=False))
        if not row.get("path"):
            raise UserError(f"{where} has no path")
        if "label" in columns and not row.get("label"):
            raise UserError(f"{where} has no label")
        yield reader.line_num, row["path"], int_or_str(row["label"]) if "label" in columns else None


def _check_columns(columns: Sequence[str], path: str, option: str) -> None:
    """Check the first line of a table, and log which columns are not read."""
    if "path" not in columns:
        cure = "; separate columns by commas" if len(columns) == 1 and {";", "\t"} & {*columns[0]} else ""
        raise UserError(
            f"{option}: the first line of '{path}' names no column 'path' (it has: {', '.join(columns)}){cure}"
        )
    if twice := [name for name, count in Counter(columns).items() if count > 1 and name in COLUMNS]:
        raise UserError(f"{option}: the first line of '{path}' names the column '{twice[0]}' twice")
    if unread := [name for name in columns if name not in COLUMNS]:
        cure = "" if "label" in columns else "; a column named 'label' gives the classes"
        log.info(f"{option}: columns of '{path}' that are not read: {', '.join(unread)}{cure}")


def _by_stem(files: Iterable[File]) -> dict[str, list[File]]:
    by_stem: dict[str, list[File]] = {}
    for file in files:
        by_stem.setdefault(_stem(file.name.rpartition("/")[2]), []).append(file)
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
