"""List image files."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vqf.data.files.packed import File, gc_paused
from vqf.errors import UserError

log = logging.getLogger("vqf")

MAX_ENDINGS = 8  # in a log line, the most frequent first


@dataclass
class Listing:
    """The images below a folder by path, and what lies beside them."""

    files: list[File] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # number of other files by ending
    repeated: list[str] = field(default_factory=list)  # links to folders that are listed already

    def log_left_out(self, folder: Path, option: str, cure: str) -> None:
        """Log how many files are left out, if any.

        Args:
            option: Name of the option that is the folder.
            cure: What reads more of them.
        """
        if self.left_out:
            log.info(f"{option}: {self.describe_left_out()} in '{folder}' are left out; {cure}")
        if self.repeated:
            log.info(
                f"{option}: {len(self.repeated)} links in '{folder}' lead to folders that are listed already, such as "
                f"'{self.repeated[0]}'; their images count once"
            )

    def describe_left_out(self) -> str:
        """Return "3 files (.avif 2, .txt 1)"."""
        endings = [f"{ending} {count}" for ending, count in self.left_out.most_common(MAX_ENDINGS)]
        if (more := len(self.left_out) - MAX_ENDINGS) > 0:
            endings.append(f"{more} other endings")
        return f"{self.left_out.total()} files ({', '.join(endings)})"


def scan(root: Path, extensions: Sequence[str]) -> Listing:
    """List images below a folder by path; follow links, skip hidden files and folders.

    Raises:
        UserError: If a folder cannot be listed.
    """
    listing = Listing()
    with gc_paused():
        listing.files = sorted(_walk(root, tuple(extension.lower() for extension in extensions), listing))
    return listing


def _walk(root: Path, extensions: tuple[str, ...], listing: Listing) -> Iterator[File]:
    visited: set[str] = set()
    folders = [("", os.fspath(root))]
    while folders:
        prefix, folder = folders.pop()
        real = os.path.realpath(folder)
        if real in visited:  # links may form a cycle
            listing.repeated.append(prefix.rstrip("/"))
            continue
        visited.add(real)
        entries = _entries(folder)
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        listing.left_out["hidden"] += len(entries) - len(visible)
        subfolders = sorted(entry.name for entry in visible if _is_folder(entry))
        folders += [(f"{prefix}{name}/", os.path.join(folder, name)) for name in reversed(subfolders)]
        for entry in visible:
            if _is_folder(entry):
                continue
            if entry.name.lower().endswith(extensions):
                yield File(f"{prefix}{entry.name}", _size(entry))
            else:
                listing.left_out[os.path.splitext(entry.name)[1].lower() or "no ending"] += 1
    listing.left_out = +listing.left_out  # without the zeros


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        reason = f"'{error.filename}' ({(error.strerror or '').lower()})"
        raise UserError(f"data.root: cannot list the folder {reason}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1
