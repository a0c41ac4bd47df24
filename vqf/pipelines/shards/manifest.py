"""`manifest.json`: the finished shards of a folder."""

import json
import re
import time
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vqf.atomic import atomic_write_text, remove_leftovers
from vqf.errors import UserError
from vqf.file_kinds import check_regular
from vqf.hashing import sha256_of_file
from vqf.terminal import log, progress

VERSION = 3
MANIFEST_NAME = "manifest.json"
HASH_THREADS = 4  # shards hashed at a time; hashing waits for the disk and releases the GIL
QUICK_SAVE_SECONDS = 0.1  # the manifest is saved after every shard as long as that takes less
SAVE_INTERVAL_FACTOR = 20  # after that saving takes at most 1/20 of the time: with many thousand shards it is slow


@dataclass(frozen=True)
class SkippedSample:
    """An image that could not be read."""

    key: str  # key that the sample would have: its index, or shard and index for a stream
    name: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """Manifest entry of a shard."""

    name: str
    images: int
    bytes: int
    sha256: str
    skipped: list[SkippedSample] = field(default_factory=list)
    broken: str = ""  # why the source shard could not be read to its end

    @property
    def split_name(self) -> str:
        return self.name.rpartition("-")[0]


class ShardManifest:
    """Tracks which shards of a folder are finished.

    Raises:
        UserError: If the folder holds other shards; it is not changed then.
    """

    def __init__(self, folder: Path, provenance: dict[str, Any], names: Collection[str]) -> None:
        self.folder, self.path, self.provenance = folder, folder / MANIFEST_NAME, {"version": VERSION, **provenance}
        self.shards: dict[str, ShardRecord] = {}
        self.requeued: dict[str, ShardRecord] = {}  # finished shards that are written again, for more images
        self.last_saved, self.save_interval = 0.0, 0.0
        records = self._read() if self.path.exists() else None
        if records is None and (existing := next((name for name in names if (folder / name).exists()), None)):
            raise UserError(
                f"out={folder}: holds '{existing}', and no {MANIFEST_NAME} of pipeline=shard beside it; "
                "choose another folder"
            )
        self.recorded = [record for record in records or () if record.name in names]
        self.names = names

    def start(self) -> None:
        """Verify the shards and delete temporary files. The caller must hold the lock."""
        self._verify(self.recorded)
        remove_leftovers(self.folder, {*self.names, MANIFEST_NAME})
        if not self.path.exists():
            self.save()

    def requeue(self, name: str) -> None:
        """Have a shard written again; its file and record stay until then."""
        if name in self.shards:
            self.requeued[name] = self.shards.pop(name)

    def add(self, record: ShardRecord) -> None:
        """Record a finished shard; save only if the last time is long ago."""
        self.requeued.pop(record.name, None)
        self.shards[record.name] = record
        if time.monotonic() > self.last_saved + self.save_interval:
            self.save()

    def save(self, finished: bool = False) -> None:
        began = time.monotonic()
        images: Counter[str] = Counter()
        records = [record for _, record in sorted({**self.shards, **self.requeued}.items())]
        for record in records:
            images[record.split_name] += record.images
        shards = [asdict(record) for record in records]
        content = {**self.provenance, "finished": finished, "images": dict(images), "shards": shards}
        atomic_write_text(self.path, json.dumps(content, indent=1))
        self.last_saved = time.monotonic()
        seconds = self.last_saved - began
        self.save_interval = SAVE_INTERVAL_FACTOR * seconds if seconds > QUICK_SAVE_SECONDS else 0.0

    def _read(self) -> list[ShardRecord]:
        check_regular(self.path)
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            version, shards = content["version"], content["shards"]
            records = [_parse_record(entry) for entry in shards] if version == VERSION else []
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"out={self.folder}: its {MANIFEST_NAME} is not one of pipeline=shard; choose another folder"
            ) from error
        if version != VERSION:
            raise UserError(f"out={self.folder}: holds shards of another version of vqf; choose another folder")
        if {key: content.get(key) for key in self.provenance} != self.provenance:
            raise UserError(
                f"out={self.folder}: holds shards of other images, or with other options; choose another folder"
            )
        return records

    def _verify(self, records: list[ShardRecord]) -> None:
        paths = [self.folder / record.name for record in records]
        with ThreadPoolExecutor(HASH_THREADS) as pool, progress("verify shards", len(records)) as bar:
            for record, path, intact in zip(records, paths, pool.map(_is_intact, paths, records), strict=True):
                if intact:
                    self.shards[record.name] = record
                else:
                    log.warning("'%s' differs from its hash in %s; writing it again", path, MANIFEST_NAME)
                bar.advance()


def _is_intact(path: Path, record: ShardRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.bytes and sha256_of_file(path) == record.sha256


def _parse_record(entry: Mapping[str, Any]) -> ShardRecord:
    """Parse an untrusted manifest entry.

    Raises:
        ValueError: If it is malformed.
    """
    match entry:
        case {
            "name": str(name),
            "images": int(images),
            "bytes": int(size),
            "sha256": str(digest),
            "skipped": list(skipped),
            "broken": str(broken),
        } if re.fullmatch(r"\w+-\d+\.tar", name) and images >= 0:
            return ShardRecord(name, images, size, digest, [_parse_skipped(sample) for sample in skipped], broken)
    raise ValueError("no entry of a shard")


def _parse_skipped(entry: Mapping[str, Any]) -> SkippedSample:
    match entry:
        case {"key": str(key), "name": str(name), "reason": str(reason)} if re.fullmatch(r"\d{1,18}(-\d{1,18})?", key):
            return SkippedSample(key, name, reason)
    raise ValueError("no entry of an image")
