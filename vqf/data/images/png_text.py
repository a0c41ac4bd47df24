"""PNG images without their text.

Pillow refuses an image whose text or color profile is long once decompressed. vqf needs neither.
"""

import io
import struct
from pathlib import Path
from typing import IO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
UNUSED_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def without_text(source: Path | IO[bytes]) -> IO[bytes] | None:
    """Return a PNG without its text chunks and color profile; None if it has none, or is no PNG."""
    content = source.read_bytes() if isinstance(source, Path) else _read_from_start(source)
    if not content.startswith(SIGNATURE):
        return None
    kept, position = [SIGNATURE], len(SIGNATURE)
    while position + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length  # length, name, content and checksum
        if name not in UNUSED_CHUNKS:
            kept.append(content[position:end])
        position = end
    shorter = b"".join(kept)
    return io.BytesIO(shorter) if len(shorter) < len(content) else None


def _read_from_start(source: IO[bytes]) -> bytes:
    source.seek(0)
    return source.read()
