"""Cached tokens on disk, which stage 2 trains on.

Row r holds the tokens of image r % num_images in view r // num_images; a view is the augmentation of one epoch.
"""

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqf.atomic import atomic_path, atomic_write_text, remove_leftovers, write_weights
from vqf.batch import Batch
from vqf.dataloading.order import SampleKey, ShuffledBatches
from vqf.errors import UserError
from vqf.hashing import sha256_of_file
from vqf.terminal import log

VERSION = 2
DEFAULT_ROWS_PER_SHARD = 4096  # 4 MiB for images of 256 tokens
CONDITION_COLUMN_PREFIX = "condition_indices."  # before the name of a conditioner


@dataclass(frozen=True)
class TokenDataset:
    """The memory-mapped tokens of a split; epoch e trains on view e % num_augmentations.

    Columns of a shard of R rows: "tokens" (R, T) int32, int64 where a codebook has over 2^31 codes; if the data has
    them, "labels" (R,) int64 and "crop_boxes" (R, 4) float; for each conditioner of images
    "condition_indices.<name>" (R, h, w) int32.
    """

    shards: Sequence[Mapping[str, Tensor]]
    num_images: int

    def __len__(self) -> int:
        return self.num_images

    @property
    def num_augmentations(self) -> int:
        return sum(len(shard["tokens"]) for shard in self.shards) // self.num_images

    @property
    def condition_names(self) -> list[str]:
        return [
            name.removeprefix(CONDITION_COLUMN_PREFIX)
            for name in self.shards[0]
            if name.startswith(CONDITION_COLUMN_PREFIX)
        ]

    def mean_crop_extent(self) -> list[float] | None:
        """Return mean height and width of the crop boxes, as fractions of the image; None without boxes."""
        if "crop_boxes" not in self.shards[0]:
            return None
        sums = [(shard["crop_boxes"][:, 2:] - shard["crop_boxes"][:, :2]).abs().sum(0) for shard in self.shards]
        count = sum(len(shard["crop_boxes"]) for shard in self.shards)
        mean: list[float] = (torch.stack(sums).sum(0) / count).tolist()
        return mean

    def batches(self, order: ShuffledBatches, start: int, stop: int) -> Generator[Batch]:
        for step in range(start, stop):
            keys = order.batch(step)
            yield self.gather([epoch for epoch, _ in keys], [index for _, index in keys])

    def gather(self, epochs: list[int], indices: list[int]) -> Batch:
        """Return the batch of the images `indices`, each in the view of its epoch."""
        rows = torch.tensor(epochs) % self.num_augmentations * self.num_images + torch.tensor(indices)
        columns = self._gather(rows)
        conditions = {name: columns[f"{CONDITION_COLUMN_PREFIX}{name}"] for name in self.condition_names}
        return Batch(
            labels=columns.get("labels"),
            tokens=columns["tokens"].long(),
            crop_boxes=columns.get("crop_boxes"),
            condition_indices={
                name: each if each.is_floating_point() else each.long() for name, each in conditions.items()
            },
        )

    def _gather(self, rows: Tensor) -> dict[str, Tensor]:
        size = len(self.shards[0]["tokens"])
        columns = {name: column.new_empty(len(rows), *column.shape[1:]) for name, column in self.shards[0].items()}
        for number in (rows // size).unique().tolist():
            positions = (rows // size == number).nonzero().flatten()
            for name, column in self.shards[number].items():
                columns[name][positions] = column[rows[positions] % size]
        return columns


class TokenShardManifest:
    """Manifest `<split>.json` of the token shards `<split>-00000.safetensors` and so on.

    Args:
        provenance: Hashes of everything that determines the tokens.
        num_augmentations: Views per image.
        rows: Rows per shard; by default as in the manifest, or `DEFAULT_ROWS_PER_SHARD`.

    Raises:
        UserError: If the manifest has another provenance or shard size, or is damaged.
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
        self.path = folder / f"{split_name}.json"
        self.num_images, self.num_rows = num_images, num_images * num_augmentations
        self.rows_per_shard, self.shards = rows or DEFAULT_ROWS_PER_SHARD, dict[str, dict[str, Any]]()
        if self.path.exists():
            self._load_existing(rows)
        self.num_shards = -(-self.num_rows // self.rows_per_shard)

    def shard_path(self, number: int) -> Path:
        return self.folder / f"{self.split_name}-{number:05d}.safetensors"

    def shard_rows(self, number: int) -> int:
        return min(self.rows_per_shard, self.num_rows - number * self.rows_per_shard)

    def shard_keys(self, number: int, batch_size: int) -> Iterator[list[SampleKey]]:
        first = number * self.rows_per_shard
        stop = first + self.shard_rows(number)
        for start in range(first, stop, batch_size):
            yield [divmod(row, self.num_images) for row in range(start, min(start + batch_size, stop))]

    def missing_shards(self) -> list[int]:
        """Return the shards that are missing or differ from their hash, and forget these."""
        missing = []
        for number in range(self.num_shards):
            path = self.shard_path(number)
            entry = self.shards.get(path.name)
            if entry is not None and path.is_file() and sha256_of_file(path) == entry.get("sha256"):
                continue
            if entry is not None:
                log.warning("'%s' differs from its hash in %s; writing it again", path, self.path.name)
            self.shards.pop(path.name, None)
            missing.append(number)
        return missing

    def remove_leftovers(self) -> None:
        """Delete what a killed process left of its shards; call it before any rank writes."""
        names = {self.shard_path(number).name for number in range(self.num_shards)}
        remove_leftovers(self.folder, {*names, self.path.name})

    def write(self, number: int, columns: Mapping[str, Tensor]) -> str:
        path = self.shard_path(number)
        with _explain_disk_errors(path), atomic_path(path) as temporary:
            write_weights(columns, temporary)
            return sha256_of_file(temporary)

    def add(self, hashes: Mapping[int, str]) -> None:
        for number, digest in hashes.items():
            self.shards[self.shard_path(number).name] = {"rows": self.shard_rows(number), "sha256": digest}
        finished = len(self.shards) == self.num_shards
        counts = {"images": self.num_images, "rows": self.rows_per_shard, "finished": finished}
        content = {"version": VERSION, **counts, "origin": self.provenance, "shards": dict(sorted(self.shards.items()))}
        with _explain_disk_errors(self.path):
            atomic_write_text(self.path, json.dumps(content, indent=1))

    def open_dataset(self) -> TokenDataset:
        """Memory-map all shards.

        Raises:
            UserError: If a shard cannot be opened, or has unexpected columns or rows.
        """
        shards = [_mmap_shard(self.shard_path(number)) for number in range(self.num_shards)]
        for number, shard in enumerate(shards):
            lengths = {name: len(column) for name, column in shard.items()}
            if lengths != dict.fromkeys({"tokens", *shards[0]}, self.shard_rows(number)):
                raise _damaged_error(self.shard_path(number), f"expected {self.shard_rows(number)} rows of tokens")
        return TokenDataset(shards, self.num_images)

    def _load_existing(self, rows: int | None) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            version, existing_rows, origin, shards = (content[key] for key in ("version", "rows", "origin", "shards"))
            if version != VERSION or not isinstance(existing_rows, int) or existing_rows < 1:
                raise ValueError(f"version {version}, rows {existing_rows}")
            existing = {key: origin.get(key) for key in self.provenance}
            self.shards = {name: dict(entry) for name, entry in shards.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged_error(self.path, str(error)) from error
        for key, value in self.provenance.items():
            if existing[key] != value:
                raise UserError(
                    f"tokens.root: {self.path} was made with {key} {existing[key]}, this run has {value}; "
                    f"tokens of another {key} do not fit. Leave tokens.root out to encode them again"
                )
        if rows not in (None, existing_rows):
            raise UserError(
                f"rows={rows}: the shards in {self.folder} have {existing_rows}; leave rows out, or delete them"
            )
        self.rows_per_shard = existing_rows


@contextmanager
def _explain_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"tokens.root: {path} cannot be written: {error.strerror}; free some space, or choose another folder"
        ) from error


def _mmap_shard(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged_error(path, str(error)) from error
    if any(column.ndim == 0 for column in columns.values()):
        raise _damaged_error(path, "it holds no rows")
    return columns


def _damaged_error(path: Path, reason: str) -> UserError:
    return UserError(f"tokens.root: {path} is damaged ({reason}); delete it, and it is written again")
