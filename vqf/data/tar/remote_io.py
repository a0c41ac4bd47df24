"""Check the URLs of shards, and read untrusted shards with webdataset."""

import json
import logging
import os
import re
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from vqf.data.tar.index import BLOCK
from vqf.data.tar.members import SampleMembers, check_member
from vqf.data.tar.reader import MAX_MEMBER_BYTES
from vqf.errors import UserError
from vqf.file_kinds import check_regular

log = logging.getLogger("vqf")

ALLOW_PIPES_VARIABLE = "VQF_ALLOW_PIPES"
URL_PATTERN = re.compile(r"pipe:|file:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
MAX_MANIFEST_BYTES = 2**28
EXIT_TIMEOUT = 1.0  # seconds in which a command must exit by itself

SampleNote = Callable[[str, tuple[str, ...]], None]
TarSample = dict[str, Any]  # `__key__`, `__url__`, and the bytes of each member by extension


class BrokenShardError(ValueError):
    """A shard that cannot be opened, is no tar, or is truncated."""


@dataclass(frozen=True)
class RawSample:
    """The undecoded members of a sample."""

    name: str  # SHARD/KEY.EXTENSION of the image
    content: bytes
    label: bytes | None
    map_name: str = ""  # empty if there is no condition map
    map_content: bytes = b""


def is_url(name: str) -> bool:
    """Whether a name is a URL and no path."""
    return bool(URL_PATTERN.match(name))


def check_url(url: str, option: str) -> None:
    """Refuse URLs that webdataset cannot open, and commands that were not allowed.

    Otherwise the config in somebody else's checkpoint could run their command.

    Raises:
        UserError: With the cure.
    """
    from webdataset.gopen import gopen_schemes

    scheme = url.partition(":")[0].lower()
    if scheme == "pipe" and os.environ.get(ALLOW_PIPES_VARIABLE) != "1":
        raise UserError(
            f"{option}={url}: pipe: runs a shell command; if you trust it, set the environment variable "
            f"{ALLOW_PIPES_VARIABLE}=1 first"
        )
    if scheme not in (*gopen_schemes, "file") or scheme == "__default__":
        known = ", ".join(sorted({*gopen_schemes, "file"} - {"__default__"}))
        raise UserError(
            f"{option}={redact_url(url)}: webdataset cannot open {scheme}: (only {known}); "
            "pipe: reads the output of a command, as in 'pipe:aws s3 cp s3://bucket/a.tar -'"
        )


def redact_url(url: str) -> str:
    """Remove user, password, query and fragment from a URL."""
    if url.startswith("pipe:") or "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def shard_name(url: str) -> str:
    """Return the file name of a URL; a command as it is."""
    return url if url.startswith("pipe:") else PurePosixPath(urlsplit(url).path).name


def read_remote_manifest(root: str) -> dict[str, Any]:
    """Read the manifest of a remote folder, empty if there is none."""
    try:
        with _open_url(f"{root.rstrip('/')}/manifest.json") as stream:
            if not (text := stream.read(MAX_MANIFEST_BYTES)):
                raise EOFError("empty")
            content = json.loads(text)
    except ValueError as error:  # includes BrokenShardError
        log.info(f"data.root: no manifest.json at '{redact_url(root)}' ({error})")
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("shards"), list) else {}


def iter_raw_samples(url: str, roles: SampleMembers, note: SampleNote = lambda *_: None) -> Iterator[RawSample]:
    """Yield the samples of a shard that have an image.

    Args:
        note: Is given the name and the extensions of every sample.

    Raises:
        BrokenShardError: After the last readable sample.
        UserError: As in `iter_samples`.
    """
    for sample in iter_samples(url, roles):
        key = sample.pop("__key__")
        extensions = [extension for extension in sample if extension != "__url__"]
        note(f"{shard_name(url)}/{key}", tuple(extensions))
        if (image := roles.find_image(extensions)) is None:
            continue
        extension = roles.find_map(extensions)
        condition = (f"{key}.{extension}", sample[extension]) if extension else ("", b"")
        name = f"{shard_name(url)}/{key}.{image}"
        yield RawSample(name, sample[image], sample.get(roles.label_extension), *condition)


def iter_samples(url: str, roles: SampleMembers) -> Iterator[TarSample]:
    """Yield all samples of a shard.

    Raises:
        BrokenShardError: After the last readable sample.
        UserError: If a member has an unsafe name, or occurs twice.
    """
    from webdataset.tariterators import group_by_keys

    try:
        # Key and extension travel as one name, joined by a character that no safe name has.
        yield from group_by_keys(_members(url, roles), keys=lambda name: tuple(name.split("\0")))
    except (BrokenShardError, UserError):
        raise
    except ValueError as error:
        name = str(error.args[0]).partition(": duplicate")[0].replace("\0", ".")
        raise UserError(f"data.root: the shard '{redact_url(url)}' holds '{name}' twice") from error


def _members(url: str, roles: SampleMembers) -> Iterator[dict[str, Any]]:
    ends: list[bool] = []
    with _open_url(url) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_end_marker_header(ends)) as tar:
        for info in tar:
            key_and_extension = check_member(redact_url(url), info)
            if info.isreg() and key_and_extension is not None:
                yield {"fname": "\0".join(roles.split(*key_and_extension)), "data": _content(tar, info), "__url__": url}
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
        if not ends:
            raise tarfile.ReadError("it is truncated")


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    if info.size > MAX_MEMBER_BYTES:
        raise tarfile.ReadError(f"'{info.name}' has {info.size} bytes, more than {MAX_MEMBER_BYTES}")
    file = tar.extractfile(info)
    assert file is not None, "a regular file"
    return file.read()


def _end_marker_header(ends: list[bool]) -> type[tarfile.TarInfo]:
    """Make a header class that notes the end marker."""

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: Any, encoding: Any, errors: str) -> "Header":
            if bytes(buf) == bytes(BLOCK):
                ends.append(True)
            return super().frombuf(buf, encoding, errors)

    return Header


@contextmanager
def _open_url(url: str) -> Iterator[IO[bytes]]:
    """Open a URL, and turn any error into a BrokenShardError."""
    from webdataset.gopen import gopen

    try:
        if url.lower().startswith("file:"):
            check_regular(urlsplit(url).path)
        stream = gopen(url)
    except (OSError, ValueError, ImportError) as error:
        raise BrokenShardError(_reason(error, url)) from error
    process = os.getpid()
    try:
        yield stream
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise BrokenShardError(_command_failure(stream) or _reason(error, url)) from error
    finally:
        if process == os.getpid():  # a worker process forked in between must not close its parent's stream
            _close(stream)


def _command_failure(stream: IO[bytes]) -> str | None:
    if (process := getattr(stream, "proc", None)) is None:
        return None
    try:
        status = process.wait(EXIT_TIMEOUT)
    except subprocess.TimeoutExpired:  # it still writes; the output itself is broken
        return None
    return f"the command that fetches it ended with status {status}" if status else None


def _close(stream: IO[bytes]) -> None:
    if (process := getattr(stream, "proc", None)) is not None:
        process.kill()  # it may wait for a silent server
    with suppress(OSError):
        stream.close()


def _reason(error: Exception, url: str) -> str:
    """Word an error without quoting the URL, which may hold tokens."""
    # The error of a command would quote all of the URL, tokens included.
    if isinstance(error, OSError):
        file = f"'{error.filename}': " if error.filename and not url.endswith(str(error.filename)) else ""
        return file + (error.strerror or "the command that fetches it failed").lower()
    return " ".join(str(error).split()).lower() or type(error).__name__
