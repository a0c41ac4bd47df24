"""Shards that lie elsewhere: their addresses, and reading one from end to end.

webdataset opens the address (https:, gs:, hf:, file:, the output of a command, ...) and groups the members; what is in
a shard is no more trusted than on a disk. Nothing is extracted, and nothing but images is decoded.
"""

import json
import logging
import os
import re
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from vqf.data.tar.index import BLOCK, MAX_MEMBER_BYTES, check_member
from vqf.errors import UserError

log = logging.getLogger("vqf")

ALLOW_PIPES_VARIABLE = "VQF_ALLOW_PIPES"
URL_PATTERN = re.compile(r"pipe:|file:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
MAX_MANIFEST_BYTES = 2**28  # bytes
EXIT_TIMEOUT = 1.0  # seconds that a command has to end by itself

TarSample = dict[str, Any]  # `__key__` and, by the endings of the members, their bytes


class BrokenShardError(ValueError):
    """A shard that cannot be opened, is none, or ends early."""


def is_url(name: str) -> bool:
    """Tell an address from a path."""
    return bool(URL_PATTERN.match(name))


def check_url(url: str, option: str) -> None:
    """Refuse what webdataset cannot open, and commands that nobody has allowed.

    A checkpoint keeps the config of its run, addresses included: without this, looking at a checkpoint of somebody
    else could run their command.

    Raises:
        UserError: With what to do.
    """
    from webdataset.gopen import gopen_schemes

    scheme = url.partition(":")[0].lower()
    if scheme == "pipe" and os.environ.get(ALLOW_PIPES_VARIABLE) != "1":
        raise UserError(
            f"{option}={url}: pipe: runs a command of the shell; if you trust it, set the variable "
            f"{ALLOW_PIPES_VARIABLE}=1 first"
        )
    if scheme not in (*gopen_schemes, "file") or scheme == "__default__":
        known = ", ".join(sorted({*gopen_schemes, "file"} - {"__default__"}))
        raise UserError(
            f"{option}={redact_url(url)}: webdataset opens no {scheme}: (but {known}); "
            "pipe: takes what a command writes, as in 'pipe:aws s3 cp s3://bucket/a.tar -'"
        )


def redact_url(url: str) -> str:
    """Return an address without what may be a password or a token in it."""
    if url.startswith("pipe:") or "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def shard_name(url: str) -> str:
    """Return what a shard is called: the last part of its address."""
    return url if url.startswith("pipe:") else PurePosixPath(urlsplit(url).path).name


def read_remote_manifest(root: str) -> dict[str, Any]:
    """Read the manifest that pipeline=shard left beside the shards at an address; empty where there is none."""
    try:
        with _open_url(f"{root.rstrip('/')}/manifest.json") as stream:
            if not (text := stream.read(MAX_MANIFEST_BYTES)):
                raise EOFError("empty")
            content = json.loads(text)
    except ValueError as error:  # a BrokenShardError among them
        log.info(f"data.root: no manifest.json at '{redact_url(root)}' ({error})")
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("shards"), list) else {}


def iter_samples(url: str) -> Iterator[TarSample]:
    """Yield what a shard holds, sample by sample.

    Raises:
        BrokenShardError: After the samples that can be had, with a reason in a few words.
        UserError: If it is not to be trusted, or holds a name twice.
    """
    from webdataset.tariterators import group_by_keys

    try:
        yield from group_by_keys(_members(url), keys=lambda name: tuple(name.split("\0")))
    except (BrokenShardError, UserError):
        raise
    except ValueError as error:
        name = str(error.args[0]).partition(": duplicate")[0].replace("\0", ".")
        raise UserError(f"data.root: the shard '{redact_url(url)}' holds '{name}' twice") from error


def _members(url: str) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar as webdataset groups them; one that does not end as a tar does is broken."""
    ends: list[bool] = []
    with _open_url(url) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_end_marker_header(ends)) as tar:
        for info in tar:
            named = check_member(redact_url(url), info)
            if info.isreg() and named is not None:
                yield {"fname": "\0".join(named), "data": _content(tar, info), "__url__": url}
            tar.members = []  # type: ignore[attr-defined]  # they would add up
        if not ends:
            raise tarfile.ReadError("it ends early")


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    if info.size > MAX_MEMBER_BYTES:
        raise tarfile.ReadError(f"'{info.name}' has {info.size} bytes, more than {MAX_MEMBER_BYTES}")
    file = tar.extractfile(info)
    assert file is not None, "a regular file"
    return file.read()


def _end_marker_header(ends: list[bool]) -> type[tarfile.TarInfo]:
    """Return a kind of header that notes the block of zeros which ends every tar; tarfile itself does without one."""

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: Any, encoding: Any, errors: str) -> "Header":
            if bytes(buf) == bytes(BLOCK):
                ends.append(True)
            return super().frombuf(buf, encoding, errors)

    return Header


@contextmanager
def _open_url(url: str) -> Iterator[IO[bytes]]:
    """Open an address; whatever goes wrong while it is read becomes a BrokenShardError."""
    from webdataset.gopen import gopen

    try:
        stream = gopen(url)
    except (OSError, ValueError, ImportError) as error:
        raise BrokenShardError(_reason(error, url)) from error
    process = os.getpid()
    try:
        yield stream
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise BrokenShardError(_command_failure(stream) or _reason(error, url)) from error
    finally:
        if process == os.getpid():  # a worker process that was forked meanwhile leaves it to its parent
            _close(stream)


def _command_failure(stream: IO[bytes]) -> str | None:
    """Say why the command that fetches a shard failed, if it did; what it wrote is only a consequence of that."""
    if (process := getattr(stream, "proc", None)) is None:
        return None
    try:
        status = process.wait(EXIT_TIMEOUT)
    except subprocess.TimeoutExpired:  # it goes on writing what cannot be read
        return None
    return f"the command that fetches it ended with status {status}" if status else None


def _close(stream: IO[bytes]) -> None:
    if (process := getattr(stream, "proc", None)) is not None:
        process.kill()  # it may wait for a server that says nothing
    with suppress(OSError):
        stream.close()


def _reason(error: Exception, url: str) -> str:
    """Word an error; that of a command would quote the whole of it, tokens included, and that of a file its address."""
    if isinstance(error, OSError):
        what = f"'{error.filename}': " if error.filename and not url.endswith(str(error.filename)) else ""
        return what + (error.strerror or "the command that fetches it failed").lower()
    return " ".join(str(error).split()).lower() or type(error).__name__
