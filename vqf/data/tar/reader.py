"""Random access to members of tar files."""

import os
import zlib
from collections import OrderedDict
from pathlib import Path

from vqf.data.images.decode import UnreadableError
from vqf.data.tar.index_file import INDEX_SUFFIX
from vqf.file_kinds import check_regular

MAX_MEMBER_BYTES = 2**30  # a larger member is not read into memory
MAX_OPEN_FILES = 64


class TarReader:
    """Reads members by offset, with an LRU cache of open files, safe after a fork."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._file_descriptors: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        # File descriptors mean nothing in another process.
        return {"paths": self.paths, "_file_descriptors": OrderedDict()}

    def read(self, shard: int, offset: int, size: int, crc: int) -> bytes:
        """Return the bytes of a member.

        Raises:
            UnreadableError: If they are missing, or have another CRC-32.
        """
        if size > MAX_MEMBER_BYTES:
            raise UnreadableError(f"{size} bytes, more than {MAX_MEMBER_BYTES}")
        try:
            # pread has no file position: forked processes can share the descriptor.
            content = os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise UnreadableError(f"{self.paths[shard].name}: {(error.strerror or 'error').lower()}") from error
        if len(content) < size:
            raise UnreadableError(f"{self.paths[shard].name} is truncated")
        if zlib.crc32(content) != crc:
            raise UnreadableError(f"its checksum is not the one in {self.paths[shard].name}{INDEX_SUFFIX}")
        return content

    def _file(self, shard: int) -> int:
        if shard not in self._file_descriptors:
            if len(self._file_descriptors) >= MAX_OPEN_FILES:
                os.close(self._file_descriptors.popitem(last=False)[1])
            check_regular(self.paths[shard])
            self._file_descriptors[shard] = os.open(self.paths[shard], os.O_RDONLY)
        self._file_descriptors.move_to_end(shard)
        return self._file_descriptors[shard]

    def __del__(self) -> None:
        for descriptor in self._file_descriptors.values():
            os.close(descriptor)
