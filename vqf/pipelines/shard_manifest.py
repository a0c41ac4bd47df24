"""`manifest.json`: which shards a folder holds, and of what."""

import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vqf.errors import UserError
from vqf.terminal import log, progress

VERSION = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"
HASHERS = 4  # shards that are verified side by side: hashing them waits for the disk, and holds up no other thread


@dataclass(frozen=True)
class Written:
    """What the manifest says of a shard."""

    name: str
    pictures: int
    bytes: int
    sha256: str
    left_out: dict[str, str] = field(default_factory=dict)  # which pictures are not in it, and why
    broken: str = ""  # why the shard that it was copied from could not be read to its end

    @property
    def part(self) -> str:
        """The part of the data that it is of."""
        return self.name.rpartition("-")[0]


class Manifest:
    """The manifest of a folder, and which of its shards are finished.

    Args:
        folder: Is made.
        made_of: What the shards are made of, and how.

    Raises:
        UserError: If the folder holds the shards of other pictures, or made with other options.
    """

    def __init__(self, folder: Path, made_of: dict[str, Any]) -> None:
        self.path, self.made_of = folder / MANIFEST, {"version": VERSION, **made_of}
        self.shards: dict[str, Written] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for half in folder.glob(f".*{PARTIAL}"):
            half.unlink()
        if self.path.exists():
            self._take_up(folder)

    def add(self, written: Written) -> None:
        """Record a finished shard."""
        self.shards[written.name] = written
        self._save(False)

    def finish(self, names: list[str]) -> None:
        """Record that these are all, in this order."""
        self.shards = {name: self.shards[name] for name in names}
        self._save(True)

    def _take_up(self, folder: Path) -> None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            same = {key: found.get(key) for key in self.made_of} == self.made_of
            shards = [Written(**each) for each in found["shards"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"to={folder}: its {MANIFEST} is not one of pipeline=shard; choose another folder"
            ) from error
        if not same:
            raise UserError(
                f"to={folder}: holds shards of other pictures, or with other options; choose another folder"
            )
        self._keep(folder, [each for each in shards if not each.broken])
        for each in shards:
            if each.broken:
                log.info("'%s' is written again: its shard could not be read to its end", each.name)

    def _keep(self, folder: Path, shards: list[Written]) -> None:
        """Keep the shards that are what they were when they were written."""
        paths = [folder / Path(each.name).name for each in shards]
        with ThreadPoolExecutor(HASHERS) as pool, progress("verify shards", len(shards)) as bar:
            for each, path, whole in zip(shards, paths, pool.map(_is_whole, paths, shards), strict=True):
                if whole:
                    self.shards[each.name] = each
                else:
                    log.warning("'%s' is not what %s says; it is written again", path, MANIFEST)
                bar.advance()

    def _save(self, finished: bool) -> None:
        pictures: Counter[str] = Counter()
        for each in self.shards.values():
            pictures[each.part] += each.pictures
        shards = [asdict(each) for each in self.shards.values()]
        content = {**self.made_of, "finished": finished, "pictures": dict(pictures), "shards": shards}
        temporary = self.path.with_name(f".{MANIFEST}{PARTIAL}")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def _is_whole(path: Path, known: Written) -> bool:
    return path.is_file() and path.stat().st_size == known.bytes and sha256(path) == known.sha256


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
