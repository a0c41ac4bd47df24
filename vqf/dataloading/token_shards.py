"""Tokens on disk: what stage 2 trains on, made once from a data source by one tokenizer.

Every view of every picture is a row: row r is picture r % pictures as it looks in view r // pictures. A view is one
epoch's augmentation. Rows lie in shards, so many in each, which are mapped into memory: of a part that is larger than
the memory there is, only what was looked at last is there.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqf.atomic import flush, write_weights
from vqf.batch import Batch
from vqf.dataloading.order import Key, Order
from vqf.errors import UserError
from vqf.hashing import sha256
from vqf.terminal import log

VERSION = 1
ROWS = 4096  # of a shard: 4 MiB where a picture has 256 tokens
CODES = "codes."  # in front of the name of a condition


@dataclass(frozen=True)
class Tokens:
    """The tokens of a part of the data; epoch e trains on view e modulo their number.

    A shard has "tokens" (R, N) int32, which is half the memory, and vocabularies stay below 2**31; where the data has
    them "labels" (R,) int64 and "places" (R, 4) float; and for every condition that is a picture "codes.<name>"
    (R, h, w) int32. R is the same for all shards but the last.
    """

    shards: Sequence[Mapping[str, Tensor]]
    pictures: int

    def __len__(self) -> int:
        return self.pictures

    @property
    def views(self) -> int:
        """How often each picture is there."""
        return sum(len(shard["tokens"]) for shard in self.shards) // self.pictures

    @property
    def codes(self) -> list[str]:
        """The names of the conditions whose codes are here."""
        return [name.removeprefix(CODES) for name in self.shards[0] if name.startswith(CODES)]

    def extent(self) -> list[float] | None:
        """Return the mean height and width of what pictures show, as shares of their wholes; None without places."""
        if "places" not in self.shards[0]:
            return None
        sums = [(shard["places"][:, 2:] - shard["places"][:, :2]).abs().sum(0) for shard in self.shards]
        total: list[float] = (torch.stack(sums).sum(0) / sum(len(shard["places"]) for shard in self.shards)).tolist()
        return total

    def batches(self, order: Order, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps `start` to `stop` - 1."""
        for step in range(start, stop):
            keys = order.batch(step)
            yield self.pick([epoch for epoch, _ in keys], [index for _, index in keys])

    def pick(self, epochs: list[int], indices: list[int]) -> Batch:
        """Return the batch of some pictures, as they look in some epochs."""
        rows = torch.tensor(epochs) % self.views * self.pictures + torch.tensor(indices)
        found = self._gather(rows)
        codes = {name: found[f"{CODES}{name}"].long() for name in self.codes}
        labels, places = found.get("labels"), found.get("places")
        return Batch(labels=labels, tokens=found["tokens"].long(), places=places, codes=codes)

    def _gather(self, rows: Tensor) -> dict[str, Tensor]:
        size = len(self.shards[0]["tokens"])
        found = {name: each.new_empty(len(rows), *each.shape[1:]) for name, each in self.shards[0].items()}
        for number in (rows // size).unique().tolist():
            here = (rows // size == number).nonzero().flatten()
            for name, column in self.shards[number].items():
                found[name][here] = column[rows[here] % size]
        return found


class Manifest:
    """`<part>.json`: what the shards of a part were made of, how many there are, and the hash of each.

    Args:
        folder: Of the shards, `<part>-00000.safetensors` and so on.
        part: "train" or "validation".
        origin: What decides the tokens, each by its name.
        pictures: Of the part.
        views: Of each picture.
        rows: Of a shard; as many as the folder began with by default.

    Raises:
        UserError: If the folder has the tokens of another origin, or other shards, or a manifest that is none.
    """

    def __init__(
        self, folder: Path, part: str, origin: Mapping[str, str], pictures: int, views: int, rows: int | None = None
    ) -> None:
        self.folder, self.part, self.origin = folder, part, dict(origin)
        self.path, self.pictures, self.total = folder / f"{part}.json", pictures, pictures * views
        self.rows, self.shards = rows or ROWS, dict[str, dict[str, Any]]()
        if self.path.exists():
            self._take_up(rows)
        self.count = -(-self.total // self.rows)

    def file(self, number: int) -> Path:
        """Return where a shard lies."""
        return self.folder / f"{self.part}-{number:05d}.safetensors"

    def size(self, number: int) -> int:
        """Return the rows of a shard; the last may have fewer."""
        return min(self.rows, self.total - number * self.rows)

    def keys(self, number: int, batch_size: int) -> Iterator[list[Key]]:
        """Yield view and index of the rows of a shard, in batches, of which the last may be smaller."""
        first = number * self.rows
        stop = first + self.size(number)
        for start in range(first, stop, batch_size):
            yield [divmod(row, self.pictures) for row in range(start, min(start + batch_size, stop))]

    def missing(self) -> list[int]:
        """Return the shards that are not there, or not as they were written."""
        found = []
        for number in range(self.count):
            path = self.file(number)
            known = self.shards.get(path.name)
            if known is not None and path.is_file() and sha256(path) == known.get("sha256"):
                continue
            if known is not None:
                log.warning("'%s' is not what %s says; it is made again", path, self.path.name)
            self.shards.pop(path.name, None)
            found.append(number)
        return found

    def write(self, number: int, columns: Mapping[str, Tensor]) -> str:
        """Write a shard beside its name, rename it when it is whole, and return its hash."""
        path = self.file(number)
        temporary = path.with_name(f".{path.name}.partial")
        with _writing(path):
            try:
                write_weights(columns, temporary)
                digest = sha256(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return digest

    def add(self, hashes: Mapping[int, str]) -> None:
        """Record shards that are written, by their numbers."""
        for number, digest in hashes.items():
            self.shards[self.file(number).name] = {"rows": self.size(number), "sha256": digest}
        finished = len(self.shards) == self.count
        facts = {"pictures": self.pictures, "rows": self.rows, "finished": finished}
        content = {"version": VERSION, **facts, "origin": self.origin, "shards": dict(sorted(self.shards.items()))}
        temporary = self.path.with_name(f".{self.path.name}.partial")
        with _writing(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
            flush(temporary)
            temporary.replace(self.path)

    def open(self) -> Tokens:
        """Map the shards into memory.

        Raises:
            UserError: If one of them holds something else.
        """
        shards = [_mapped(self.file(number)) for number in range(self.count)]
        for number, shard in enumerate(shards):
            found = {name: len(column) for name, column in shard.items()}
            if found != dict.fromkeys({"tokens", *shards[0]}, self.size(number)):
                raise _damaged(self.file(number), f"{self.size(number)} rows of tokens were to be in it")
        return Tokens(shards, self.pictures)

    def _take_up(self, rows: int | None) -> None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            version, theirs, origin, shards = (found[key] for key in ("version", "rows", "origin", "shards"))
            if version != VERSION or not isinstance(theirs, int) or theirs < 1:
                raise ValueError(f"version {version}, rows {theirs}")
            named = {key: origin.get(key) for key in self.origin}
            self.shards = {name: dict(each) for name, each in shards.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(self.path, str(error)) from error
        for key, value in self.origin.items():
            if named[key] != value:
                raise UserError(
                    f"tokens.root: {self.path} was made with {key} {named[key]}, this run has {value}; "
                    f"tokens of another {key} mean something else. Leave tokens.root out and they are made anew"
                )
        if rows not in (None, theirs):
            raise UserError(f"rows={rows}: the shards in {self.folder} have {theirs}; leave rows out, or delete them")
        self.rows = theirs


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"tokens.root: {path} cannot be written: {error.strerror}; make room, or name another"
        ) from error


def _mapped(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    if any(column.ndim == 0 for column in found.values()):
        raise _damaged(path, "it holds no rows")
    return found


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"tokens.root: {path} is damaged ({why}); delete it, and it is made anew")
