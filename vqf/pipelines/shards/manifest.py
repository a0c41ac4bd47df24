"""`manifest.json`: which shards a folder holds, and of what."""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vqf.errors import UserError
from vqf.hashing import sha256
from vqf.terminal import log, progress

VERSION = 2
MANIFEST = "manifest.json"
PARTIAL = ".partial"
HASHERS = 4  # shards that are verified side by side: hashing them waits for the disk, and holds up no other thread
PAUSE = 20  # times as long as it took is the time before it is written again: of many thousand shards it takes a while


@dataclass(frozen=True)
class LeftOut:
    """A picture that is not in its shard."""

    key: str  # what its sample would be called: its number, where the source is no stream
    name: str
    why: str


@dataclass(frozen=True)
class Written:
    """What the manifest says of a shard."""

    name: str
    pictures: int
    bytes: int
    sha256: str
    left_out: list[LeftOut] = field(default_factory=list)
    broken: str = ""  # why the shard that it was copied from could not be read to its end

    @property
    def part(self) -> str:
        """The part of the data that it is of."""
        return self.name.rpartition("-")[0]


class Manifest:
    """The manifest of a folder, and which of its shards are finished.

    Args:
        folder: Where they are.
        made_of: What the shards are made of, and how.
        names: Of all shards that there are to be.

    Raises:
        UserError: If the folder holds other shards. Nothing in it is touched then.
    """

    def __init__(self, folder: Path, made_of: dict[str, Any], names: Collection[str]) -> None:
        self.folder, self.path, self.made_of = folder, folder / MANIFEST, {"version": VERSION, **made_of}
        self.shards: dict[str, Written] = {}
        self.doubtful: dict[str, Written] = {}  # from which something is missing that may be there by now
        self.saved, self.pause = 0.0, 0.0
        found = self._read() if self.path.exists() else None
        if found is None and (stranger := next((name for name in names if (folder / name).exists()), None)):
            raise UserError(
                f"to={folder}: holds '{stranger}', and no {MANIFEST} of pipeline=shard beside it; choose another folder"
            )
        self.found = [each for each in found or () if each.name in names]
        self.names = names

    def open(self) -> None:
        """Begin, as the only process that does: keep what is finished, and throw away what is half-written."""
        self._keep(self.found)
        for half in self.folder.glob(f".*{PARTIAL}"):
            if half.name[1:].removesuffix(PARTIAL).rpartition(".")[0] in {*self.names, MANIFEST}:
                half.unlink(missing_ok=True)
        if not self.path.exists():
            self.save()

    def doubt(self, name: str) -> None:
        """Put a shard among those that are tried again; until then it is what there is."""
        if name in self.shards:
            self.doubtful[name] = self.shards.pop(name)

    def add(self, written: Written) -> None:
        """Record a finished shard."""
        self.doubtful.pop(written.name, None)
        self.shards[written.name] = written
        if time.monotonic() > self.saved + self.pause:
            self.save()

    def save(self, finished: bool = False) -> None:
        """Write what is known; `finished` says that these are all."""
        began = time.monotonic()
        pictures: Counter[str] = Counter()
        known = [each for _, each in sorted({**self.shards, **self.doubtful}.items())]
        for each in known:
            pictures[each.part] += each.pictures
        shards = [asdict(each) for each in known]
        content = {**self.made_of, "finished": finished, "pictures": dict(pictures), "shards": shards}
        temporary = self.path.with_name(f".{MANIFEST}.{os.getpid()}{PARTIAL}")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
        self.saved = time.monotonic()
        self.pause = PAUSE * (self.saved - began)

    def _read(self) -> list[Written]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            version, shards = found["version"], found["shards"]
            written = [_written(each) for each in shards] if version == VERSION else []
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"to={self.folder}: its {MANIFEST} is not one of pipeline=shard; choose another folder"
            ) from error
        if version != VERSION:
            raise UserError(f"to={self.folder}: holds shards of another version of vqf; choose another folder")
        if {key: found.get(key) for key in self.made_of} != self.made_of:
            raise UserError(
                f"to={self.folder}: holds shards of other pictures, or with other options; choose another folder"
            )
        return written

    def _keep(self, shards: list[Written]) -> None:
        """Keep the shards that are what they were when they were written."""
        paths = [self.folder / each.name for each in shards]
        with ThreadPoolExecutor(HASHERS) as pool, progress("verify shards", len(shards)) as bar:
            for each, path, whole in zip(shards, paths, pool.map(_is_whole, paths, shards), strict=True):
                if whole:
                    self.shards[each.name] = each
                else:
                    log.warning("'%s' is not what %s says; it is written again", path, MANIFEST)
                bar.advance()


def _is_whole(path: Path, known: Written) -> bool:
    return path.is_file() and path.stat().st_size == known.bytes and sha256(path) == known.sha256


def _written(said: Mapping[str, Any]) -> Written:
    """Read an entry, which anybody may have written.

    Raises:
        ValueError: If it makes no sense.
    """
    match said:
        case {
            "name": str(name),
            "pictures": int(pictures),
            "bytes": int(size),
            "sha256": str(digest),
            "left_out": list(left_out),
            "broken": str(broken),
        } if re.fullmatch(r"\w+-\d+\.tar", name) and pictures >= 0:
            return Written(name, pictures, size, digest, [_left_out(each) for each in left_out], broken)
    raise ValueError("no entry of a shard")


def _left_out(said: Mapping[str, Any]) -> LeftOut:
    match said:
        case {"key": str(key), "name": str(name), "why": str(why)} if re.fullmatch(r"\d{1,18}(-\d{1,18})?", key):
            return LeftOut(key, name, why)
    raise ValueError("no entry of a picture")
