"""Damage to a file, of every kind that a disk, a killed process or a person does."""

from collections.abc import Callable
from pathlib import Path


def flip(content: bytes) -> bytes:
    """Flip a bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flip,
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "nul": lambda content: bytes(len(content)),
    "bytes": lambda content: bytes(range(256)) * 4,
    "list": lambda content: b"[1, [2], {}]\n",
    "number": lambda content: b"1e999\n",
    "shapes": lambda content: (
        b'{"step": "x", "values": 3, "protocol": {"name": [1]}, "codes": 5, "id": {}, "command": {"a": 1}, '
        b'"wall_seconds": "x", "versions": 1, "checkpoint": [], "intervals": {"psnr": 5}, "commands": 7}\n'
    ),
    "nested": lambda content: b"[" * 100_000,
    "date": lambda content: b"steps: 2001-99-99\n",  # YAML
}
KINDS = (*DAMAGES, "folder")


def damage(path: Path, kind: str) -> None:
    """Damage a file, or put a folder in its place."""
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(DAMAGES[kind](content))
