"""One process at a time in a folder."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vqf.errors import UserError

LOCK = ".lock"
TAKEN = {errno.EACCES, errno.EAGAIN}  # what a lock of another process is told by


@contextmanager
def held(folder: Path, option: str = "run_dir") -> Iterator[None]:
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
        file = (folder / LOCK).open("a+b", buffering=0)
    except OSError as error:
        raise UserError(unwritable(error, folder, option)) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                raise UserError(_taken(folder, option)) from error
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            raise UserError(unwritable(error, folder, option)) from error
        yield
        with suppress(OSError):
            file.truncate(0)


def unwritable(error: OSError, folder: Path | None = None, option: str = "run_dir") -> str:
    """Say that a folder that the user named cannot be written."""
    where = f"{option}={folder or error.filename}" if folder or error.filename else option
    return f"{where}: cannot be written ({error.strerror or error}); make room there, or give another {option}"


def _taken(folder: Path, option: str) -> str:
    who = (folder / LOCK).read_text() or "another process"
    return f"{option}={folder}: {who} is running there; wait until it ends, or give another {option}"
