"""`manifest.json`: which shards a folder holds, and of what."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
