"""The index of a tar: `name.tar.idx`, JSON, one list per column."""

import json
import logging
import os
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from vqf.atomic import atomic_path
from vqf.file_kinds import check_regular

log = logging.getLogger("vqf")

VERSION = 3
INDEX_SUFFIX = ".idx"


class TarMember(NamedTuple):
    """One regular file of a tar."""

    key: str  # its name up to the first dot
    extension: str  # the rest, in lower case
    offset: int  # of its bytes in the tar
    size: int
    crc: int  # CRC-32 of its bytes
    text: str | None = None  # its content, if it is a short label


@dataclass(frozen=True)
class TarIndex:
    """The members of a tar, with its length and modification time."""

    size: int
    mtime_ns: int
    intact: bool  # whether it ended with the end marker of a tar
    members: list[TarMember]
    left_out: dict[str, int] = field(default_factory=dict)  # number of other members by kind


def index_path(tar: Path, folder: Path | None) -> Path:
    """Return the path of an index beside the tar, or in a folder, with a hash of the tar's."""
    if folder is None:
        return tar.with_name(tar.name + INDEX_SUFFIX)
    parent = os.fsencode(tar.resolve().parent)
    return folder / f"{zlib.crc32(parent):08x}-{tar.name}{INDEX_SUFFIX}"


def read_index(path: Path) -> TarIndex | None:
    """Read an index; None if it is missing or invalid."""
    try:
        check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            return None
        index, columns = TarIndex(**content), [content["members"][field] for field in TarMember._fields]
        if not _is_valid(index, columns):
            return None
        return replace(index, members=list(map(TarMember._make, zip(*columns, strict=True))))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning(f"data.root: the index '{path}' cannot be used ({error}); it is rebuilt")
        return None


def write_index(index: TarIndex, path: Path) -> None:
    """Write an index atomically; only log that a folder is read-only."""
    members = zip(*index.members, strict=True) if index.members else ([] for _ in TarMember._fields)
    columns = dict(zip(TarMember._fields, members, strict=True))  # JSON columns parse several times as fast as rows
    content = {"version": VERSION, **vars(index), "members": columns}
    try:
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, separators=(",", ":"))
    except OSError as error:
        reason = (error.strerror or "").lower()
        log.info(f"data.index: cannot write '{path}' ({reason}); the index is rebuilt in every run")


def _is_valid(index: TarIndex, columns: list[Any]) -> bool:
    totals = [index.size, index.mtime_ns, *index.left_out.values()]
    numbers = [*columns[2:5], totals]
    typed = all(map(_is_column_of, columns, (str, str, int, int, int, str | None))) and _is_column_of(totals, int)
    return typed and all(min(column, default=0) >= 0 for column in numbers)


def _is_column_of(column: Any, kind: Any) -> bool:
    # The few types of a long column are checked, not its many values. bool is a subclass of int.
    return isinstance(column, list) and all(
        value_type is not bool and issubclass(value_type, kind) for value_type in {*map(type, column)}
    )
