"""Refuse what is not a file: opening a named pipe waits for ever, and a device need not end."""

import errno
import os
import stat

SPECIAL_KINDS = {
    stat.S_IFIFO: "a named pipe (fifo)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: str | os.PathLike[str]) -> None:
    """Check that a path can be read to its end.

    Raises:
        OSError: If there is nothing, or a named pipe, socket or device.
    """
    if kind := SPECIAL_KINDS.get(stat.S_IFMT(os.stat(path).st_mode)):
        raise OSError(errno.EINVAL, f"{kind}, not a file", os.fspath(path))
