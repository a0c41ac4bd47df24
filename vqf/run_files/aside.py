"""Damaged records: named in one line, and set aside where a new one must be written."""

import logging
from functools import cache
from itertools import count
from pathlib import Path

ASIDE_PREFIX = "aside-"

log = logging.getLogger("vqf")


def set_aside(path: Path, reason: str) -> None:
    """Rename a file or folder to `aside_path`, and say so.

    Raises:
        OSError: If it cannot be renamed.
    """
    target = aside_path(path)
    path.rename(target)
    log.warning("%s: %s; moved to %s", path, reason, target.name)


def make_way(path: Path) -> None:
    """Set aside what is no file at the place of one, such as a folder."""
    if path.exists() and not path.is_file():
        set_aside(path, not_a_file(path))


def aside_path(path: Path) -> Path:
    """Return the first free of aside-NAME, aside-2-NAME, ..."""
    first = path.with_name(f"{ASIDE_PREFIX}{path.name}")
    others = (path.with_name(f"{ASIDE_PREFIX}{i}-{path.name}") for i in count(2))
    return first if not first.exists() else next(other for other in others if not other.exists())


def not_a_file(path: Path) -> str:
    return "is a folder, not a file" if path.is_dir() else "is no file"


@cache
def warn_once(message: str) -> None:
    """Log a warning, once in a process: a page reads the same file again and again."""
    log.warning("%s", message)
