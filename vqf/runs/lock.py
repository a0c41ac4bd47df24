"""One process at a time in a folder."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vqf.errors import UserError

LOCK_FILE = ".lock"
OWNER_PREFIX = b"process"  # what it begins with, if somebody holds it
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LOCKED_ERRNOS = {errno.EACCES, errno.EAGAIN}  # what a lock of another process is told by


@contextmanager
def folder_lock(folder: Path, option: str = "run_dir") -> Iterator[None]:
    """Keep other processes from running in a folder as long as this one does.

    A lock of POSIX ends with its process, however that ends, and is not inherited by processes that it has started,
    which may outlive it for a moment. Over a network it holds where the disk passes locks on, as NFS does from version
    4; where a disk knows none, nothing is held.

    Args:
        folder: Is made.
        option: By which the user named it.

    Raises:
        UserError: If another process runs there, or nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(unwritable_message(error, folder, option)) from error
    with os.fdopen(number, "r+b", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCKED_ERRNOS:
                raise UserError(_locked_message(folder, option)) from error
        if (said := file.read(len(OWNER_PREFIX))) and said != OWNER_PREFIX:
            raise UserError(f"{option}={folder}: its file '{LOCK_FILE}' is none of vqf's; give another {option}")
        try:
            file.truncate(0)
            file.seek(0)
            file.write(OWNER_PREFIX + f" {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            raise UserError(unwritable_message(error, folder, option)) from error
        yield
        with suppress(OSError):
            file.truncate(0)


def unwritable_message(error: OSError, folder: Path | None = None, option: str = "run_dir") -> str:
    """Say that a folder that the user named cannot be written."""
    where = f"{option}={folder or error.filename}" if folder or error.filename else option
    room = "make room there, or " if error.errno in DISK_FULL_ERRNOS else ""
    return f"{where}: cannot be written ({error.strerror or error}); {room}give another {option}"


def _locked_message(folder: Path, option: str) -> str:
    who = (folder / LOCK_FILE).read_text() or "another process"
    return f"{option}={folder}: {who} is running there; wait until it ends, or give another {option}"
