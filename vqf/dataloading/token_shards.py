"""Tokens on disk: what stage 2 trains on, made once from a data source by one tokenizer.

Every view of every image is a row: row r is image r % images as it looks in view r // images. A view is one
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

from vqf.atomic import atomic_path, atomic_write_text, write_weights
from vqf.batch import Batch
from vqf.dataloading.order import SampleKey, ShuffledBatches
from vqf.errors import UserError
from vqf.hashing import sha256_of_file
from vqf.terminal import log

VERSION = 2
DEFAULT_ROWS_PER_SHARD = 4096  # of a shard: 4 MiB where an image has 256 tokens
CONDITION_COLUMN_PREFIX = "condition_indices."  # in front of the name of a condition


@dataclass(frozen=True)
class TokenDataset:
    """The tokens of a part of the data; epoch e trains on view e modulo their number.

    A shard has "tokens" (R, N) int32, which is half the memory, and vocabularies stay below 2**31; where the data has
    them "labels" (R,) int64 and "crop_boxes" (R, 4) float; and for every condition that is an image "codes.<name>"
    (R, h, w) int32. R is the same for all shards but the last.
    """

    shards: Sequence[Mapping[str, Tensor]]
    num_images: int

    def __len__(self) -> int:
        return self.num_images

    @property
    def num_augmentations(self) -> int:
        """How often each image is there."""
        return sum(len(shard["tokens"]) for shard in self.shards) // self.num_images

    @property
    def condition_names(self) -> list[str]:
        """The names of the conditions whose codes are here."""
        return [
            name.removeprefix(CONDITION_COLUMN_PREFIX)
            for name in self.shards[0]
            if name.startswith(CONDITION_COLUMN_PREFIX)
        ]

    def mean_crop_extent(self) -> list[float] | None:
        """Return the mean height and width of what images show, as shares of their wholes; None without places."""
        if "crop_boxes" not in self.shards[0]:
            return None
        sums = [(shard["crop_boxes"][:, 2:] - shard["crop_boxes"][:, :2]).abs().sum(0) for shard in self.shards]
        count = sum(len(shard["crop_boxes"]) for shard in self.shards)
        mean: list[float] = (torch.stack(sums).sum(0) / count).tolist()
        return mean

    def batches(self, order: ShuffledBatches, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps `start` to `stop` - 1."""
        for step in range(start, stop):
            keys = order.batch(step)
            yield self.gather([epoch for epoch, _ in keys], [index for _, index in keys])

    def gather(self, epochs: list[int], indices: list[int]) -> Batch:
        """Return the batch of some images, as they look in some epochs."""
        rows = torch.tensor(epochs) % self.num_augmentations * self.num_images + torch.tensor(indices)
        found = self._gather(rows)
        codes = {name: found[f"{CONDITION_COLUMN_PREFIX}{name}"].long() for name in self.condition_names}
        labels, places = found.get("labels"), found.get("crop_boxes")
        return Batch(labels=labels, tokens=found["tokens"].long(), crop_boxes=places, condition_indices=codes)

    def _gather(self, rows: Tensor) -> dict[str, Tensor]:
        size = len(self.shards[0]["tokens"])
        found = {name: each.new_empty(len(rows), *each.shape[1:]) for name, each in self.shards[0].items()}
        for number in (rows // size).unique().tolist():
            here = (rows // size == number).nonzero().flatten()
            for name, column in self.shards[number].items():
                found[name][here] = column[rows[here] % size]
        return found


class TokenShardManifest:
    """`<part>.json`: what the shards of a part were made of, how many there are, and the hash of each.

    Args:
        folder: Of the shards, `<part>-00000.safetensors` and so on.
        split_name: "train" or "validation".
        provenance: What decides the tokens, each by its name.
        num_images: Of the part.
        num_augmentations: Of each image.
        rows: Of a shard; as many as the folder began with by default.

    Raises:
        UserError: If the folder has the tokens of another origin, or other shards, or a manifest that is none.
    """

    def __init__(
        self,
        folder: Path,
        split_name: str,
        provenance: Mapping[str, str],
        num_images: int,
        num_augmentations: int,
        rows: int | None = None,
    ) -> None:
        self.folder, self.split_name, self.provenance = folder, split_name, dict(provenance)
        self.path, self.num_images, self.num_rows = (
            folder / f"{split_name}.json",
            num_images,
            num_images * num_augmentations,
        )
        self.rows_per_shard, self.shards = rows or DEFAULT_ROWS_PER_SHARD, dict[str, dict[str, Any]]()
        if self.path.exists():
            self._load_existing(rows)
        self.num_shards = -(-self.num_rows // self.rows_per_shard)

    def shard_path(self, number: int) -> Path:
        """Return where a shard lies."""
        return self.folder / f"{self.split_name}-{number:05d}.safetensors"

    def shard_rows(self, number: int) -> int:
        """Return the rows of a shard; the last may have fewer."""
        return min(self.rows_per_shard, self.num_rows - number * self.rows_per_shard)

    def shard_keys(self, number: int, batch_size: int) -> Iterator[list[SampleKey]]:
        """Yield view and index of the rows of a shard, in batches, of which the last may be smaller."""
        first = number * self.rows_per_shard
        stop = first + self.shard_rows(number)
        for start in range(first, stop, batch_size):
            yield [divmod(row, self.num_images) for row in range(start, min(start + batch_size, stop))]

    def missing_shards(self) -> list[int]:
        """Return the shards that are not there, or not as they were written."""
        found = []
        for number in range(self.num_shards):
            path = self.shard_path(number)
            known = self.shards.get(path.name)
            if known is not None and path.is_file() and sha256_of_file(path) == known.get("sha256"):
                continue
            if known is not None:
                log.warning("'%s' is not what %s says; it is made again", path, self.path.name)
            self.shards.pop(path.name, None)
            found.append(number)
        return found

    def write(self, number: int, columns: Mapping[str, Tensor]) -> str:
        """Write a shard beside its name, rename it when it is whole, and return its hash."""
        path = self.shard_path(number)
        with _explain_disk_errors(path), atomic_path(path) as temporary:
            write_weights(columns, temporary)
            return sha256_of_file(temporary)

    def add(self, hashes: Mapping[int, str]) -> None:
        """Record shards that are written, by their numbers."""
        for number, digest in hashes.items():
            self.shards[self.shard_path(number).name] = {"rows": self.shard_rows(number), "sha256": digest}
        finished = len(self.shards) == self.num_shards
        facts = {"images": self.num_images, "rows": self.rows_per_shard, "finished": finished}
        content = {"version": VERSION, **facts, "origin": self.provenance, "shards": dict(sorted(self.shards.items()))}
        with _explain_disk_errors(self.path):
            atomic_write_text(self.path, json.dumps(content, indent=1))

    def open_dataset(self) -> TokenDataset:
        """Map the shards into memory.

        Raises:
            UserError: If one of them holds something else.
        """
        shards = [_mmap_shard(self.shard_path(number)) for number in range(self.num_shards)]
        for number, shard in enumerate(shards):
            found = {name: len(column) for name, column in shard.items()}
            if found != dict.fromkeys({"tokens", *shards[0]}, self.shard_rows(number)):
                raise _damaged_error(
                    self.shard_path(number), f"{self.shard_rows(number)} rows of tokens were to be in it"
                )
        return TokenDataset(shards, self.num_images)

    def _load_existing(self, rows: int | None) -> None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            version, theirs, origin, shards = (found[key] for key in ("version", "rows", "origin", "shards"))
            if version != VERSION or not isinstance(theirs, int) or theirs < 1:
                raise ValueError(f"version {version}, rows {theirs}")
            named = {key: origin.get(key) for key in self.provenance}
            self.shards = {name: dict(each) for name, each in shards.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged_error(self.path, str(error)) from error
        for key, value in self.provenance.items():
            if named[key] != value:
                raise UserError(
                    f"tokens.root: {self.path} was made with {key} {named[key]}, this run has {value}; "
                    f"tokens of another {key} mean something else. Leave tokens.root out and they are made anew"
                )
        if rows not in (None, theirs):
            raise UserError(f"rows={rows}: the shards in {self.folder} have {theirs}; leave rows out, or delete them")
        self.rows_per_shard = theirs


@contextmanager
def _explain_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"tokens.root: {path} cannot be written: {error.strerror}; make room, or name another"
        ) from error


def _mmap_shard(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged_error(path, str(error)) from error
    if any(column.ndim == 0 for column in found.values()):
        raise _damaged_error(path, "it holds no rows")
    return found


def _damaged_error(path: Path, why: str) -> UserError:
    return UserError(f"tokens.root: {path} is damaged ({why}); delete it, and it is made anew")
