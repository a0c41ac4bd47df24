"""Any data source into shards of tokens, in any number of processes: before stage 2, or as the first thing it does."""

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
from vqf.config.settings import to_cli
from vqf.dataloading.loader import keyed_batches
from vqf.dataloading.read_errors import sync_read_errors
from vqf.dataloading.token_shards import CONDITION_COLUMN_PREFIX, TokenDataset, TokenShardManifest
from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.errors import UserError
from vqf.hashing import sha256_of_tensors
from vqf.models.conditioning import ConditionerStack
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import Split


def check_image_size(config: DictConfig, tokenizer: Tokenizer) -> None:
    """Refuse an image size on the command line that is not the tokenizer's.

    Raises:
        UserError: With what to do.
    """
    if "image_size" in cli_keys() and image_size(config) != tokenizer.image_size:
        height, width = tokenizer.image_size
        raise UserError(
            f"image_size={to_cli(config.image_size)}: the tokenizer is one of {height} x {width}, and stage 2 reads "
            "its tokens at that size; leave image_size out, or train a tokenizer at the other"
        )


class TokenEncoder:
    """Images to what is kept of them: their tokens, and the codes of their conditions."""

    def __init__(self, tokenizer: Tokenizer, conditions: ConditionerStack, engine: Engine) -> None:
        self.tokenizer, self.conditions, self.engine = tokenizer.eval(), conditions.eval(), engine

    def provenance(self) -> dict[str, str]:
        """Return what decides the codes, hashed."""
        return {"tokenizer": self.tokenizer.fingerprint(), "conditions": _fingerprint(self.conditions)}

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return the columns of some rows, see `TokenDataset`."""
        batch = batch.to(self.engine.device)
        assert batch.images is not None
        with torch.no_grad(), self.engine.autocast():
            tokens, told = self.tokenizer.encode_tokens(batch.images), self.conditions.prepare(batch)
        kept = {"tokens": tokens.int(), "labels": told.labels, "crop_boxes": told.crop_boxes}
        kept |= {f"{CONDITION_COLUMN_PREFIX}{name}": each.int() for name, each in told.condition_indices.items()}
        return {name: each.cpu() for name, each in kept.items() if each is not None}


def token_folder(config: DictConfig, run_dir: Path) -> Path:
    """Return the folder of the tokens of a config."""
    return run_dir / "tokens" if config.tokens.root is None else Path(config.tokens.root).expanduser()


def tokenize_split(
    encoder: TokenEncoder, split: Split, split_name: str, folder: Path, config: DictConfig, rows: int | None = None
) -> TokenDataset:
    """Open the tokens of a part of the data in a folder; make those that are not there yet.

    Raises:
        UserError: If the folder holds the tokens of another tokenizer, of other conditions, or of other images.
    """
    views = config.tokens.augmentations if split_name == "train" else 1
    origin = encoder.provenance() | {"data": split.fingerprint, "views": str(views)}
    manifest = TokenShardManifest(folder, split_name, origin, len(split), views, rows)
    missing = comm.broadcast_object(manifest.missing_shards() if comm.is_main() else [])
    if missing:
        _write_missing(manifest, missing, encoder, split, config)
    return manifest.open_dataset()


def _write_missing(
    manifest: TokenShardManifest, missing: list[int], coder: TokenEncoder, split: Split, config: DictConfig
) -> None:
    """Make shards, as many at a time as there are processes, and record them: what is killed loses these at most."""
    mine, world = missing[comm.rank() :: comm.world_size()], comm.world_size()
    keys = (batch for number in mine for batch in manifest.shard_keys(number, config.batch_size))
    batches = keyed_batches(split, keys, workers=config.workers, timeout=config.worker_timeout)
    if comm.is_main():
        manifest.add({})
    comm.barrier()  # the folder is there
    done = manifest.num_rows - sum(map(manifest.shard_rows, missing))
    with terminal.progress(f"tokenize {manifest.split_name}", manifest.num_rows, done) as bar:
        for first in range(0, len(missing), world):
            now = missing[first : first + world]
            digest = bytes(32)
            if comm.rank() < len(now):
                number = now[comm.rank()]
                count = -(-manifest.shard_rows(number) // config.batch_size)
                pieces = _with_progress(islice(batches, count), bar, len(now))
                digest = bytes.fromhex(manifest.write(number, _concat_columns(map(coder, pieces))))
            hashes = comm.gather_rows(torch.tensor([list(digest)], dtype=torch.uint8), len(now))
            if hashes is not None:
                manifest.add({number: bytes(each).hex() for number, each in zip(now, hashes.tolist(), strict=True)})
            sync_read_errors(split)
    comm.barrier()  # all of them are written


def _with_progress(batches: Iterable[Batch], bar: terminal.ProgressBar, processes: int) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        bar.advance(min(len(batch) * processes, bar.remaining))


def _concat_columns(pieces: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for piece in pieces:
        for name, each in piece.items():
            columns[name].append(each)
    return {name: torch.cat(each) for name, each in columns.items()}


def _fingerprint(conditions: ConditionerStack) -> str:
    """Hash the conditions that make codes: which there are, and the weights of their tokenizers."""
    makers = {name: each for name, each in conditions.conditioners.items() if hasattr(each, "prepare")}
    weights = nn.ModuleDict({name: each for name, each in makers.items() if isinstance(each, nn.Module)})
    return sha256_of_tensors(weights.state_dict(), *((name, each.length) for name, each in makers.items()))[:16]
