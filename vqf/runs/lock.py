"""A file lock against a second process in a run's folder."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vqf.errors import UserError

LOCK_FILE = ".lock"
OWNER_PREFIX = b"process"  # first bytes of a lock file that is held: "process 123 on host"
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LOCKED_ERRNOS = {errno.EACCES, errno.EAGAIN}  # another process holds the lock


@contextmanager
def folder_lock(folder: Path, option: str = "run_dir") -> Iterator[None]:
    """Hold the POSIX lock of a folder inside the block; a missing folder is made.

    It ends with its process; children do not inherit it. On a network file system without locks nothing is locked.

    Args:
        option: Names the folder in the error.

    Raises:
        UserError: If another process holds the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except IsADirectoryError as error:
        raise UserError(_foreign_message(folder, option)) from error
    except OSError as error:
        raise UserError(unwritable_message(error, folder, option)) from error
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCKED_ERRNOS:
                raise UserError(_locked_message(folder, option)) from error
        if (content := file.read(len(OWNER_PREFIX))) and content != OWNER_PREFIX:
            raise UserError(_foreign_message(folder, option))
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
    """Error message for a folder that cannot be written."""
    where = f"{option}={folder or error.filename}" if folder or error.filename else option
    cure = "free disk space, or " if error.errno in DISK_FULL_ERRNOS else ""
    return f"{where}: cannot be written ({error.strerror or error}); {cure}give another {option}"


def _locked_message(folder: Path, option: str) -> str:
    owner = (folder / LOCK_FILE).read_text(errors="replace") or "another process"
    return f"{option}={folder}: {owner} is running there; wait until it ends, or give another {option}"


def _foreign_message(folder: Path, option: str) -> str:
    return f"{option}={folder}: its '{LOCK_FILE}' was not written by vqf; delete it, or give another {option}"
