"""Encode the splits of a data source into token shards."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vqf import terminal
from vqf.batch import Batch
from vqf.config.access import image_size
from vqf.config.inherit import cli_keys
from vqf.dataloading.loader import keyed_batches
from vqf.dataloading.read_errors import sync_read_errors
from vqf.dataloading.token_shards import CONDITION_COLUMN_PREFIX, TokenDataset, TokenShardManifest
from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.distributed.threads import cpu_threads
from vqf.errors import UserError
from vqf.hashing import sha256_of_tensors
from vqf.models.conditioning import ConditionerStack
from vqf.models.tokenizer import Tokenizer
from vqf.options.typed_nodes import to_cli
from vqf.protocols import Prepares, Split
from vqf.tokens.layout import TokenLayout


def check_image_size(config: DictConfig, tokenizer: Tokenizer) -> None:
    """Compare the image size on the command line with the tokenizer's.

    Raises:
        UserError: If they differ.
    """
    if "image_size" in cli_keys() and image_size(config) != tokenizer.image_size:
        height, width = tokenizer.image_size
        raise UserError(
            f"image_size={to_cli(config.image_size)}: the tokenizer was trained at {height} x {width}, and stage 2 "
            "uses its size; leave image_size out, or train a tokenizer at the other size"
        )


class TokenEncoder:
    """Encodes a batch of images into the columns of a token shard."""

    def __init__(self, tokenizer: Tokenizer, conditioner: ConditionerStack, engine: Engine) -> None:
        self.tokenizer, self.conditioner, self.engine = tokenizer.eval(), conditioner.eval(), engine

    def provenance(self) -> dict[str, str]:
        """Return the hashes of everything that determines the tokens."""
        return {"tokenizer": self.tokenizer.fingerprint(), "conditions": _fingerprint(self.conditioner)}

    @cpu_threads.watch("tokenize")
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        batch = batch.to(self.engine.device)
        assert batch.images is not None
        with torch.no_grad(), self.engine.autocast():
            tokens, condition = self.tokenizer.encode_tokens(batch.images), self.conditioner.prepare(batch)
        columns = {
            "tokens": compact(tokens, self.tokenizer.layout),
            "labels": condition.labels,
            "crop_boxes": condition.crop_boxes,
        }
        for name, indices in condition.condition_indices.items():
            columns[f"{CONDITION_COLUMN_PREFIX}{name}"] = indices if indices.is_floating_point() else indices.int()
        return {name: column.cpu() for name, column in columns.items() if column is not None}


def compact(tokens: Tensor, layout: TokenLayout) -> Tensor:
    """Tokens as int32 where every code fits, else int64."""
    return tokens.int() if layout.vocab_size <= 2**31 else tokens


def token_folder(config: DictConfig, run_dir: Path) -> Path:
    """Return `tokens.root`, or `tokens` in the run's folder."""
    return run_dir / "tokens" if config.tokens.root is None else Path(config.tokens.root).expanduser()


def tokenize_split(
    encoder: TokenEncoder, split: Split, split_name: str, folder: Path, config: DictConfig, rows: int | None = None
) -> TokenDataset:
    """Open the token shards of a split, and write those that are missing. Collective: every rank must call it.

    Args:
        config: Reads `tokens.augmentations`, `batch_size`, `workers` and `worker_timeout`.

    Raises:
        UserError: If the folder holds tokens of another tokenizer, other conditions or other images.
    """
    views = config.tokens.augmentations if split_name == "train" else 1
    provenance = encoder.provenance() | {"data": split.fingerprint, "views": str(views)}
    manifest = TokenShardManifest(folder, split_name, provenance, len(split), views, rows)
    missing = comm.broadcast_object(manifest.missing_shards() if comm.is_main() else [])
    if missing:
        _write_missing(manifest, missing, encoder, split, config)
    return manifest.open_dataset()


def _write_missing(
    manifest: TokenShardManifest, missing: list[int], encoder: TokenEncoder, split: Split, config: DictConfig
) -> None:
    own_numbers, world = missing[comm.rank() :: comm.world_size()], comm.world_size()
    # One loader for all shards of this rank: its workers start once, and load the next shard ahead.
    keys = (batch for number in own_numbers for batch in manifest.shard_keys(number, config.batch_size))
    batches = keyed_batches(split, keys, workers=config.workers, timeout=config.worker_timeout)
    if comm.is_main():
        manifest.remove_leftovers()
        manifest.add({})
    comm.barrier()  # rank 0 has made and cleared the folder
    done = manifest.num_rows - sum(map(manifest.shard_rows, missing))
    with terminal.progress(f"tokenize {manifest.split_name}", manifest.num_rows, done) as bar:
        for first in range(0, len(missing), world):
            numbers = missing[first : first + world]
            digest = bytes(32)
            if comm.rank() < len(numbers):
                number = numbers[comm.rank()]
                count = -(-manifest.shard_rows(number) // config.batch_size)
                shard_batches = _with_progress(islice(batches, count), bar, len(numbers))
                digest = bytes.fromhex(manifest.write(number, _concat_columns(map(encoder, shard_batches))))
            # Idle ranks of the last round gather zeros, since collectives need all ranks.
            digests = comm.gather_rows(torch.tensor([list(digest)], dtype=torch.uint8), len(numbers))
            if digests is not None:
                manifest.add({number: bytes(row).hex() for number, row in zip(numbers, digests.tolist(), strict=True)})
            sync_read_errors(split)
    comm.barrier()  # no rank opens the shards before all are written


def _with_progress(batches: Iterable[Batch], bar: terminal.ProgressBar, processes: int) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        bar.advance(min(len(batch) * processes, bar.remaining))


def _concat_columns(batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        for name, column in batch.items():
            columns[name].append(column)
    return {name: torch.cat(chunks) for name, chunks in columns.items()}


def _fingerprint(stack: ConditionerStack) -> str:
    conditioners = {name: each for name, each in stack.conditioners.items() if isinstance(each, Prepares)}
    weights = nn.ModuleDict({name: each for name, each in conditioners.items() if isinstance(each, nn.Module)})
    return sha256_of_tensors(weights.state_dict(), *((name, each.length) for name, each in conditioners.items()))[:16]
