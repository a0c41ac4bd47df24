"""Tar files as random access: an index of where each member lies, and reading members by position.

The index stands beside the tar as `name.tar.idx`, written beside its final name and renamed. It knows the tar's
length and time, and the CRC-32 of every member. A tar that changed is indexed again; one that is cut short keeps
its index, so that the lost images keep their places and are found missing one by one.
Nothing is ever extracted, and no name of a member becomes a path.
"""

import json
import logging
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vqf.atomic import atomic_path
from vqf.data.images.decode import UnreadableError
from vqf.errors import UserError

log = logging.getLogger("vqf")

VERSION = 3
INDEX_SUFFIX = ".idx"
BLOCK = 512
READ_CHUNK = 2**20
MAX_MEMBER_BYTES = 2**30  # bytes of a member that is read into memory
MAX_OPEN_FILES = 64
COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
INLINED_TEXT = {"cls": 32}  # endings whose text is kept in the index, up to so many bytes: a label per image


class TarMember(NamedTuple):
    """One file of a tar: `extension` is all that follows the first dot of its name, `key` what precedes it."""

    key: str
    extension: str
    offset: int
    size: int
    crc: int
    text: str | None = None


@dataclass(frozen=True)
class TarIndex:
    """What a tar of a length and time holds; `intact` is whether it ended as a tar does when it was indexed."""

    size: int
    mtime_ns: int
    intact: bool
    members: list[TarMember]


def load_index(tar: Path, folder: Path | None = None, missing_ok: bool = False) -> TarIndex:
    """Return the index of a tar: the one beside it, or in `folder`, where it is up to date, else a new one.

    Where neither can be written the new index is only kept in memory. A tar that is missing, index and all, is an empty
    one if that is `missing_ok`.

    Raises:
        UserError: If the tar is missing and so is its index, or it is compressed, no tar, or not to be trusted.
    """
    place = _index_path(tar, folder)
    old = _read_index(place)
    try:
        state = tar.stat()
    except OSError as error:
        if old is None and missing_ok and isinstance(error, FileNotFoundError):
            return TarIndex(0, 0, True, [])
        if old is None:
            raise UserError(f"data.root: no shard '{tar}' ({(error.strerror or '').lower()})") from error
        log.warning(
            f"data.root: the shard '{tar}' is missing; its {len(old.members)} members count as unreadable "
            f"(if it is not to come back, delete '{place}')"
        )
        return old
    if old is not None and (old.size, old.mtime_ns) == (state.st_size, state.st_mtime_ns):
        return old
    if old is not None and _is_truncated_copy(tar, state.st_size, old):
        log.warning(f"data.root: the shard '{tar}' ends early, after {state.st_size} of {old.size} bytes")
        return old
    new = build_index(tar)
    _write_index(new, place)
    return new


def build_index(tar: Path) -> TarIndex:
    """Read a tar from end to end.

    Raises:
        UserError: See `load_index`.
    """
    try:
        with tar.open("rb") as file:
            state = os.fstat(file.fileno())
            _check_uncompressed(tar, file.read(8))
            file.seek(0)
            members, end = _members(tar, file, state.st_size)
            whole = _has_end_marker(file, end)
    except OSError as error:
        raise UserError(
            f"data.root: cannot read the shard '{tar}' ({(error.strerror or str(error)).lower()})"
        ) from error
    return TarIndex(state.st_size, state.st_mtime_ns, whole, members)


class TarReader:
    """Reads members of many tars by position; a process may be forked from one that already reads."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._file_descriptors: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "_file_descriptors": OrderedDict()}  # file numbers mean nothing in another process

    def read(self, shard: int, offset: int, size: int, crc: int) -> bytes:
        """Return the bytes of a member of tar `shard`.

        Raises:
            UnreadableError: If they are not there, or not those that were indexed.
        """
        if size > MAX_MEMBER_BYTES:
            raise UnreadableError(f"{size} bytes, more than {MAX_MEMBER_BYTES}")
        try:
            content = os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise UnreadableError(f"{self.paths[shard].name}: {(error.strerror or 'error').lower()}") from error
        if len(content) < size:
            raise UnreadableError(f"{self.paths[shard].name} ends early")
        if zlib.crc32(content) != crc:
            raise UnreadableError(f"its checksum is not the one in {self.paths[shard].name}{INDEX_SUFFIX}")
        return content

    def _file(self, shard: int) -> int:
        if shard not in self._file_descriptors:
            if len(self._file_descriptors) >= MAX_OPEN_FILES:
                os.close(self._file_descriptors.popitem(last=False)[1])
            self._file_descriptors[shard] = os.open(self.paths[shard], os.O_RDONLY)
        self._file_descriptors.move_to_end(shard)
        return self._file_descriptors[shard]

    def __del__(self) -> None:
        for number in self._file_descriptors.values():
            os.close(number)


def split_member_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and ending at the first dot after the last slash; None where there is no key."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return (f"{folder}{slash}{stem}", ending.lower()) if stem and dot else None


def check_member(tar: Path | str, info: tarfile.TarInfo) -> tuple[str, str] | None:
    """Return key and ending of a member, None where it is no part of a sample.

    Raises:
        UserError: If its name leads elsewhere.
    """
    name = info.name.removeprefix("./")
    parts = name.split("/")
    control = any(ord(each) < 32 or ord(each) == 127 for each in name)
    if name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0] or control:
        raise UserError(f"data.root: the shard '{tar}' has a member {info.name!a}, which no data set should have")
    if info.isreg() and info.issparse():
        raise UserError(f"data.root: the shard '{tar}' has a sparse member '{name}'; pack it again without --sparse")
    return split_member_name(name)


def _members(tar: Path, file: BinaryIO, size: int) -> tuple[list[TarMember], int]:
    """List the members that can be seen, the last of which may be cut short, and where the tar should end."""
    members: list[TarMember] = []
    end = 0
    for info in _headers(tar, file):
        named = check_member(tar, info)
        end = info.offset_data + -(-info.size // BLOCK) * BLOCK if info.isreg() else info.offset_data
        if not info.isreg() or named is None:
            continue
        content, crc = _checksum(file, info.offset_data, info.size, named[1])
        members.append(TarMember(*named, info.offset_data, info.size, crc, content))
    return members, end


def _headers(tar: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the headers up to where the tar ends, or is cut off; the caller looks at which it is."""
    place = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            while (info := opened.next()) is not None:
                if info.size < 0 or info.offset <= place:  # crafted to be read for ever
                    raise tarfile.ReadError("a header leads backwards")
                place = info.offset
                yield info
                opened.members = []  # type: ignore[attr-defined]  # they would add up
    except (tarfile.TarError, EOFError) as error:
        if place < 0 and os.fstat(file.fileno()).st_size >= BLOCK:
            raise UserError(f"data.root: the shard '{tar}' is not a tar file ({str(error).lower()})") from error


def _checksum(file: BinaryIO, offset: int, size: int, ending: str) -> tuple[str | None, int]:
    """Return the text of a short member, and the checksum of any."""
    crc, left, number = 0, size, file.fileno()
    first = b""
    while left and (piece := os.pread(number, min(left, READ_CHUNK), offset + size - left)):
        first = first or piece
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    text = first.decode("utf-8", "replace").strip() if size <= INLINED_TEXT.get(ending, -1) else None
    return text, crc


def _has_end_marker(file: BinaryIO, end: int) -> bool:
    """Say whether a block of zeros, which ends every tar, follows the last member."""
    return os.pread(file.fileno(), BLOCK, end) == bytes(BLOCK)


def _check_uncompressed(tar: Path, head: bytes) -> None:
    kind = next((name for magic, name in COMPRESSION_MAGIC.items() if head.startswith(magic)), None)
    if kind:
        raise UserError(
            f"data.root: the shard '{tar}' is compressed ({kind}), so its members cannot be read one by one; "
            "unpack it to a plain .tar"
        )


def _is_truncated_copy(tar: Path, size: int, old: TarIndex) -> bool:
    """Say whether a tar is the indexed one cut short: its last whole member is where it was, and is what it was."""
    if size >= old.size:
        return False
    last = max(
        (each for each in old.members if each.offset + each.size <= size), key=lambda each: each.offset, default=None
    )
    if last is None:
        return True
    try:
        TarReader([tar]).read(0, last.offset, last.size, last.crc)
    except UnreadableError:
        return False
    return True


def _index_path(tar: Path, folder: Path | None) -> Path:
    """Name the file of an index; in a folder for many, by the tar's whole path."""
    if folder is None:
        return tar.with_name(tar.name + INDEX_SUFFIX)
    path = os.fsencode(tar.resolve().parent)
    return folder / f"{zlib.crc32(path):08x}-{tar.name}{INDEX_SUFFIX}"


def _read_index(place: Path) -> TarIndex | None:
    """Read an index; None where there is none, or it is not one of this version."""
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            return None
        index, columns = TarIndex(**content), [content["members"][field] for field in TarMember._fields]
        numbers = [*columns[2:5], [index.size, index.mtime_ns]]
        sound = all(map(_is_column_of, columns, (str, str, int, int, int, str | None))) and _is_column_of(
            numbers[3], int
        )
        if not sound or any(min(each, default=0) < 0 for each in numbers):
            return None
        return replace(index, members=list(map(TarMember._make, zip(*columns, strict=True))))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning(f"data.root: the index '{place}' cannot be used ({error}); it is made again")
        return None


def _is_column_of(column: Any, kind: Any) -> bool:
    return isinstance(column, list) and all(
        each is not bool and issubclass(each, kind) for each in {*map(type, column)}
    )


def _write_index(index: TarIndex, place: Path) -> None:
    members = zip(*index.members, strict=True) if index.members else ([] for _ in TarMember._fields)
    columns = dict(zip(TarMember._fields, members, strict=True))  # which are read several times as fast as rows
    content = {"version": VERSION, **vars(index), "members": columns}
    try:
        with atomic_path(place) as temporary, temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, separators=(",", ":"))
    except OSError as error:
        reason = (error.strerror or "").lower()
        log.info(f"data.index: cannot write '{place}' ({reason}); the index is made again for every run")
