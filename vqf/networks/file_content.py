"""What a file given in place of weights is, by its first bytes, and the cure."""

import json
import struct
import zipfile
from pathlib import Path

from vqf.errors import UserError

FIRST_BYTES = 1024  # that tell a format
MAX_HEADER = 100_000_000  # bytes of a safetensors header, its format's limit
MAX_QUOTED = 40  # characters of a text in a message

DOWNLOAD_AGAIN = "download or copy it again"
ARCHIVE = "{}; unpack it, and give the weight file in it"
# Signatures of other formats: https://en.wikipedia.org/wiki/List_of_file_signatures
SIGNATURES = {
    b"\x1f\x8b": ARCHIVE.format("a gzip archive"),
    b"\x28\xb5\x2f\xfd": ARCHIVE.format("a zstd archive"),
    b"\xfd7zXZ\x00": ARCHIVE.format("an xz archive"),
    b"7z\xbc\xaf\x27\x1c": ARCHIVE.format("a 7z archive"),
    b"Rar!": ARCHIVE.format("a rar archive"),
    b"BZh": ARCHIVE.format("a bzip2 archive"),
    b"\x89HDF": "an HDF5 file, as Keras writes; only weights of torch.save or safetensors are read",
    b"\x93NUMPY": "a NumPy array; only weights of torch.save or safetensors are read",
    b"GGUF": "a GGUF file, whose weights are quantized; give the original weights",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "a file of torch before 1.6, cut short or with more than tensors in "
    "it; where you trust it, open it with torch.load and save its state_dict alone with torch.save",
}
UTF8_MARK = b"\xef\xbb\xbf"
LFS_START = b"version https://git-lfs"
WEB_PAGE_STARTS = (b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")
ZIP_START, TAR_MAGIC = b"PK\x03\x04", slice(257, 262)  # "ustar"
PICKLE_STARTS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


def is_safetensors(path: Path) -> bool:
    """Tell whether a file begins as safetensors do: the length of a JSON header, and the header."""
    return _begins_as_safetensors(_first_bytes(path))


def describe_content(path: Path) -> str:
    """Describe an existing file that cannot be read as weights: "an empty file; download or copy it again".

    Raises:
        UserError: If it cannot be opened.
    """
    if substitute := describe_substitute(path):
        return substitute
    first = _first_bytes(path)
    for signature, description in SIGNATURES.items():
        if first.startswith(signature):
            return description
    if first.startswith(ZIP_START):
        return _describe_zip(path)
    if _begins_as_safetensors(first):
        return _describe_safetensors(path)
    return _describe_bytes(first)


def describe_substitute(path: Path) -> str | None:
    """Describe what stands in place of a file of any format after a failed download or copy; None if nothing does.

    Raises:
        UserError: If it cannot be opened.
    """
    first = _first_bytes(path)
    if not first:
        return f"an empty file; {DOWNLOAD_AGAIN}"
    if first.startswith(LFS_START):
        return (
            "a pointer of Git LFS, which stands for the file; run git lfs pull in its repository, or download the file "
            "itself"
        )
    if first.removeprefix(UTF8_MARK).lstrip().lower().startswith(WEB_PAGE_STARTS):
        return (
            "a web page (HTML), which a server sends where a file needs a sign-in or the address is that of a page "
            "about it; download the file itself"
        )
    if not first.strip(b"\0"):
        return f"a file that begins with zeros, as an interrupted download leaves; {DOWNLOAD_AGAIN}"
    return None


def _describe_bytes(first: bytes) -> str:
    if first[TAR_MAGIC] == b"ustar":
        return ARCHIVE.format("a tar archive")
    if first.startswith(PICKLE_STARTS):
        return "a pickle that torch.save did not write; save the state_dict with torch.save"
    if (line := _first_line(first.removeprefix(UTF8_MARK))) is not None:
        kind = "JSON text" if line[:1] in ("{", "[") else "text"
        return f"{kind} that begins with '{line[:MAX_QUOTED]}'; give a file of torch.save or safetensors"
    return f"neither of torch.save nor safetensors: it begins with the bytes {first[:8].hex(' ')}"


def _describe_zip(path: Path) -> str:
    if not zipfile.is_zipfile(path):
        return f"the first part of a file ({path.stat().st_size:,} bytes), cut short; {DOWNLOAD_AGAIN}"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript model; save its weights: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
    if any(name.endswith("/data.pkl") for name in names):
        return f"a damaged file of torch.save, or one with more than tensors and plain containers; {DOWNLOAD_AGAIN}"
    return ARCHIVE.format("a zip archive")


def _describe_safetensors(path: Path) -> str:
    size = path.stat().st_size
    try:
        expected = _safetensors_size(path)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        expected = 0
    if size < expected:
        return f"the first {size:,} of {expected:,} bytes of a safetensors file; {DOWNLOAD_AGAIN}"
    return f"a damaged safetensors file; {DOWNLOAD_AGAIN}"


def _safetensors_size(path: Path) -> int:
    """Read from its header how many bytes a safetensors file should have."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if 8 + length > path.stat().st_size:
            return 8 + length
        header = dict(json.loads(file.read(length)))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def _begins_as_safetensors(first: bytes) -> bool:
    return first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= MAX_HEADER


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(FIRST_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _first_line(text: bytes) -> str | None:
    """The first line of a text, else None."""
    try:
        line = (text.splitlines() or [b""])[0][: 4 * MAX_QUOTED].decode()
    except UnicodeDecodeError:
        return None
    return line if line and line.isprintable() else None
