"""`manifest.json`: which shards a folder holds, and of what."""

import json
import re
import time
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vqf.atomic import TEMPORARY_SUFFIX, atomic_write_text
from vqf.errors import UserError
from vqf.hashing import sha256_of_file
from vqf.terminal import log, progress

VERSION = 3
MANIFEST_NAME = "manifest.json"
HASH_THREADS = 4  # shards that are verified side by side: hashing them waits for the disk, and holds up no other thread
SAVE_INTERVAL_FACTOR = (
    20  # times as long as it took is the time before it is written again: of many thousand shards it takes a while
)


@dataclass(frozen=True)
class SkippedSample:
    """An image that is not in its shard."""

    key: str  # what its sample would be called: its number, where the source is no stream
    name: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of a shard."""

    name: str
    images: int
    bytes: int
    sha256: str
    skipped: list[SkippedSample] = field(default_factory=list)
    broken: str = ""  # why the shard that it was copied from could not be read to its end

    @property
    def split_name(self) -> str:
        """The part of the data that it is of."""
        return self.name.rpartition("-")[0]


class ShardManifest:
    """The manifest of a folder, and which of its shards are finished.

    Args:
        folder: Where they are.
        made_of: What the shards are made of, and how.
        names: Of all shards that there are to be.

    Raises:
        UserError: If the folder holds other shards. Nothing in it is touched then.
    """

    def __init__(self, folder: Path, made_of: dict[str, Any], names: Collection[str]) -> None:
        self.folder, self.path, self.provenance = folder, folder / MANIFEST_NAME, {"version": VERSION, **made_of}
        self.shards: dict[str, ShardRecord] = {}
        self.requeued: dict[str, ShardRecord] = {}  # from which something is missing that may be there by now
        self.last_saved, self.save_interval = 0.0, 0.0
        found = self._read() if self.path.exists() else None
        if found is None and (stranger := next((name for name in names if (folder / name).exists()), None)):
            raise UserError(
                f"out={folder}: holds '{stranger}', and no {MANIFEST_NAME} of pipeline=shard beside it; "
                "choose another folder"
            )
        self.recorded = [each for each in found or () if each.name in names]
        self.names = names

    def start(self) -> None:
        """Begin, as the only process that does: keep what is finished, and throw away what is half-written."""
        self._verify(self.recorded)
        for half in self.folder.glob(f".*{TEMPORARY_SUFFIX}"):
            if half.name[1:].removesuffix(TEMPORARY_SUFFIX).rpartition(".")[0] in {*self.names, MANIFEST_NAME}:
                half.unlink(missing_ok=True)
        if not self.path.exists():
            self.save()

    def requeue(self, name: str) -> None:
        """Put a shard among those that are tried again; until then it is what there is."""
        if name in self.shards:
            self.requeued[name] = self.shards.pop(name)

    def add(self, written: ShardRecord) -> None:
        """Record a finished shard."""
        self.requeued.pop(written.name, None)
        self.shards[written.name] = written
        if time.monotonic() > self.last_saved + self.save_interval:
            self.save()

    def save(self, finished: bool = False) -> None:
        """Write what is known; `finished` says that these are all."""
        began = time.monotonic()
        images: Counter[str] = Counter()
        known = [each for _, each in sorted({**self.shards, **self.requeued}.items())]
        for each in known:
            images[each.split_name] += each.images
        shards = [asdict(each) for each in known]
        content = {**self.provenance, "finished": finished, "images": dict(images), "shards": shards}
        atomic_write_text(self.path, json.dumps(content, indent=1))
        self.last_saved = time.monotonic()
        self.save_interval = SAVE_INTERVAL_FACTOR * (self.last_saved - began)

    def _read(self) -> list[ShardRecord]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            version, shards = found["version"], found["shards"]
            written = [_parse_record(each) for each in shards] if version == VERSION else []
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"out={self.folder}: its {MANIFEST_NAME} is not one of pipeline=shard; choose another folder"
            ) from error
        if version != VERSION:
            raise UserError(f"out={self.folder}: holds shards of another version of vqf; choose another folder")
        if {key: found.get(key) for key in self.provenance} != self.provenance:
            raise UserError(
                f"out={self.folder}: holds shards of other images, or with other options; choose another folder"
            )
        return written

    def _verify(self, shards: list[ShardRecord]) -> None:
        """Keep the shards that are what they were when they were written."""
        paths = [self.folder / each.name for each in shards]
        with ThreadPoolExecutor(HASH_THREADS) as pool, progress("verify shards", len(shards)) as bar:
            for each, path, whole in zip(shards, paths, pool.map(_is_intact, paths, shards), strict=True):
                if whole:
                    self.shards[each.name] = each
                else:
                    log.warning("'%s' is not what %s says; it is written again", path, MANIFEST_NAME)
                bar.advance()


def _is_intact(path: Path, known: ShardRecord) -> bool:
    return path.is_file() and path.stat().st_size == known.bytes and sha256_of_file(path) == known.sha256


def _parse_record(said: Mapping[str, Any]) -> ShardRecord:
    """Read an entry, which anybody may have written.

    Raises:
        ValueError: If it makes no sense.
    """
    match said:
        case {
            "name": str(name),
            "images": int(images),
            "bytes": int(size),
            "sha256": str(digest),
            "skipped": list(left_out),
            "broken": str(broken),
        } if re.fullmatch(r"\w+-\d+\.tar", name) and images >= 0:
            return ShardRecord(name, images, size, digest, [_parse_skipped(each) for each in left_out], broken)
    raise ValueError("no entry of a shard")


def _parse_skipped(said: Mapping[str, Any]) -> SkippedSample:
    match said:
        case {"key": str(key), "name": str(name), "reason": str(why)} if re.fullmatch(r"\d{1,18}(-\d{1,18})?", key):
            return SkippedSample(key, name, why)
    raise ValueError("no entry of an image")
