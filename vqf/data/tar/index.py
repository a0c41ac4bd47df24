"""Index tar files for random access.

A changed tar is indexed again. A truncated one keeps its index, and its lost images are unreadable.
"""

import logging
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vqf.data.images.decode import UnreadableError
from vqf.data.tar.index_file import TarIndex, TarMember, index_path, read_index, write_index
from vqf.data.tar.members import check_member
from vqf.data.tar.reader import TarReader
from vqf.errors import UserError
from vqf.file_kinds import check_regular

log = logging.getLogger("vqf")

BLOCK = 512  # bytes; a tar is made of such blocks
READ_CHUNK = 2**20
COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
INLINED_TEXT = {"cls": 32}  # bytes, by extension: a label this short is stored in the index


def load_index(tar: Path, folder: Path | None = None, missing_ok: bool = False) -> TarIndex:
    """Read the index of a tar, or build it, and write it if possible.

    Args:
        missing_ok: Whether a tar without a file and without an index is empty.

    Raises:
        UserError: If tar and index are missing, or the tar is compressed, no tar, or has unsafe members.
    """
    path = index_path(tar, folder)
    old = read_index(path)
    try:
        state = tar.stat()
    except OSError as error:
        if old is None and missing_ok and isinstance(error, FileNotFoundError):
            return TarIndex(0, 0, True, [])
        if old is None:
            raise UserError(f"data.root: no shard '{tar}' ({(error.strerror or '').lower()})") from error
        log.warning(
            f"data.root: the shard '{tar}' is missing; its {len(old.members)} members count as unreadable "
            f"(if it was removed on purpose, delete '{path}')"
        )
        return old
    if old is not None and (old.size, old.mtime_ns) == (state.st_size, state.st_mtime_ns):
        return old
    if old is not None and _is_truncated_copy(tar, state.st_size, old):
        log.warning(f"data.root: the shard '{tar}' is truncated: {state.st_size} of {old.size} bytes")
        return old
    index = build_index(tar)
    write_index(index, path)
    return index


def build_index(tar: Path) -> TarIndex:
    """Read a tar from end to end.

    Raises:
        UserError: As in `load_index`.
    """
    try:
        check_regular(tar)
        with tar.open("rb") as file:
            state = os.fstat(file.fileno())
            _check_uncompressed(tar, file.read(8))
            file.seek(0)
            members, end, left_out = _list_members(tar, file)
            intact = _has_end_marker(file, end)
    except OSError as error:
        raise UserError(
            f"data.root: cannot read the shard '{tar}' ({(error.strerror or str(error)).lower()})"
        ) from error
    return TarIndex(state.st_size, state.st_mtime_ns, intact, members, left_out)


def _list_members(tar: Path, file: BinaryIO) -> tuple[list[TarMember], int, dict[str, int]]:
    """Return the members, of which the last may be truncated, the offset of the end marker, and counts of others."""
    members: list[TarMember] = []
    left_out: Counter[str] = Counter()
    end = 0
    for info in _headers(tar, file):
        key_and_extension = check_member(tar, info)
        end = info.offset_data + -(-info.size // BLOCK) * BLOCK if info.isreg() else info.offset_data
        if not info.isreg() or key_and_extension is None:
            left_out.update([] if info.isdir() else [_kind_outside(info)])
            continue
        text, crc = _checksum(file, info.offset_data, info.size, key_and_extension[1])
        members.append(TarMember(*key_and_extension, info.offset_data, info.size, crc, text))
    return members, end, dict(left_out)


def _kind_outside(info: tarfile.TarInfo) -> str:
    if not info.isreg():
        return "links" if info.issym() or info.islnk() else "devices and pipes"
    return "hidden" if info.name.rpartition("/")[2].startswith(".") else "without an ending"


def _headers(tar: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the headers up to the first damage."""
    offset = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            while (info := opened.next()) is not None:
                if info.size < 0 or info.offset <= offset:  # crafted to make the reader loop forever
                    raise tarfile.ReadError("a header points backwards")
                offset = info.offset
                yield info
                opened.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
    except (tarfile.TarError, EOFError) as error:
        if offset < 0 and os.fstat(file.fileno()).st_size >= BLOCK:
            raise UserError(f"data.root: the shard '{tar}' is not a tar file ({str(error).lower()})") from error


def _checksum(file: BinaryIO, offset: int, size: int, extension: str) -> tuple[str | None, int]:
    crc, left, descriptor = 0, size, file.fileno()
    first = b""
    while left and (chunk := os.pread(descriptor, min(left, READ_CHUNK), offset + size - left)):
        first = first or chunk
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    text = first.decode("utf-8", "replace").strip() if size <= INLINED_TEXT.get(extension, -1) else None
    return text, crc


def _has_end_marker(file: BinaryIO, end: int) -> bool:
    return os.pread(file.fileno(), BLOCK, end) == bytes(BLOCK)


def _check_uncompressed(tar: Path, head: bytes) -> None:
    kind = next((name for magic, name in COMPRESSION_MAGIC.items() if head.startswith(magic)), None)
    if kind:
        raise UserError(
            f"data.root: the shard '{tar}' is compressed ({kind}), so its members cannot be read one by one; "
            "unpack it to a plain .tar"
        )


def _is_truncated_copy(tar: Path, size: int, old: TarIndex) -> bool:
    if size >= old.size:
        return False
    complete = (member for member in old.members if member.offset + member.size <= size)
    last = max(complete, key=lambda member: member.offset, default=None)
    if last is None:
        return True
    try:
        TarReader([tar]).read(0, last.offset, last.size, last.crc)
    except UnreadableError:
        return False
    return True
