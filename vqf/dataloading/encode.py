"""Any data source into shards of tokens, in any number of processes: before stage 2, or as the first thing it does."""

import hashlib
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
from vqf.config.inherit import given
from vqf.config.settings import written
from vqf.dataloading.loader import keyed
from vqf.dataloading.read_errors import agree
from vqf.dataloading.token_shards import CODES, Manifest, Tokens
from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.errors import UserError
from vqf.models.conditioning import Conditions
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import Split


def check_size(config: DictConfig, tokenizer: Tokenizer) -> None:
    """Refuse an image size on the command line that is not the tokenizer's.

    Raises:
        UserError: With what to do.
    """
    if "image_size" in given() and image_size(config) != tokenizer.image_size:
        height, width = tokenizer.image_size
        raise UserError(
            f"image_size={written(config.image_size)}: the tokenizer is one of {height} x {width}, and stage 2 reads "
            "its tokens at that size; leave image_size out, or train a tokenizer at the other"
        )


class Coder:
    """Pictures to what is kept of them: their tokens, and the codes of their conditions."""

    def __init__(self, tokenizer: Tokenizer, conditions: Conditions, engine: Engine) -> None:
        self.tokenizer, self.conditions, self.engine = tokenizer.eval(), conditions.eval(), engine

    def origin(self) -> dict[str, str]:
        """Return what decides the codes, hashed."""
        return {"tokenizer": self.tokenizer.fingerprint(), "conditions": _fingerprint(self.conditions)}

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return the columns of some rows, see `Tokens`."""
        batch = batch.to(self.engine.device)
        assert batch.images is not None
        with torch.no_grad(), self.engine.autocast():
            tokens, told = self.tokenizer.tokens(batch.images), self.conditions.prepare(batch)
        kept = {"tokens": tokens.int(), "labels": told.labels, "places": told.places}
        kept |= {f"{CODES}{name}": each.int() for name, each in told.codes.items()}
        return {name: each.cpu() for name, each in kept.items() if each is not None}


def token_folder(config: DictConfig, run_dir: Path) -> Path:
    """Return the folder of the tokens of a config."""
    return run_dir / "tokens" if config.tokens.root is None else Path(config.tokens.root).expanduser()


def tokenize_part(
    coder: Coder, split: Split, part: str, folder: Path, config: DictConfig, rows: int | None = None
) -> Tokens:
    """Open the tokens of a part of the data in a folder; make those that are not there yet.

    Raises:
        UserError: If the folder holds the tokens of another tokenizer, of other conditions, or of other pictures.
    """
    views = config.tokens.views if part == "train" else 1
    origin = coder.origin() | {"data": split.fingerprint, "views": str(views)}
    manifest = Manifest(folder, part, origin, len(split), views, rows)
    missing = comm.same(manifest.missing() if comm.first() else [])
    if missing:
        _make(manifest, missing, coder, split, config)
    return manifest.open()


def _make(manifest: Manifest, missing: list[int], coder: Coder, split: Split, config: DictConfig) -> None:
    """Make shards, as many at a time as there are processes, and record them: what is killed loses these at most."""
    mine, world = missing[comm.rank() :: comm.world()], comm.world()
    keys = (batch for number in mine for batch in manifest.keys(number, config.batch_size))
    batches = keyed(split, keys, workers=config.workers, timeout=config.worker_timeout)
    if comm.first():
        manifest.add({})
    comm.wait()  # the folder is there
    done = manifest.total - sum(map(manifest.size, missing))
    with terminal.progress(f"tokenize {manifest.part}", manifest.total, done) as bar:
        for first in range(0, len(missing), world):
            now = missing[first : first + world]
            digest = bytes(32)
            if comm.rank() < len(now):
                number = now[comm.rank()]
                count = -(-manifest.size(number) // config.batch_size)
                pieces = _watched(islice(batches, count), bar, len(now))
                digest = bytes.fromhex(manifest.write(number, _joined(map(coder, pieces))))
            hashes = comm.collect(torch.tensor([list(digest)], dtype=torch.uint8), len(now))
            if hashes is not None:
                manifest.add({number: bytes(each).hex() for number, each in zip(now, hashes.tolist(), strict=True)})
            agree(split)
    comm.wait()  # all of them are written


def _watched(batches: Iterable[Batch], bar: terminal.Bar, processes: int) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        bar.advance(min(len(batch) * processes, bar.left))


def _joined(pieces: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for piece in pieces:
        for name, each in piece.items():
            columns[name].append(each)
    return {name: torch.cat(each) for name, each in columns.items()}


def _fingerprint(conditions: Conditions) -> str:
    """Hash the conditions that make codes: which there are, and the weights of their tokenizers."""
    makers = {name: each for name, each in conditions.parts.items() if hasattr(each, "prepare")}
    digest = hashlib.sha256(repr([(name, each.length) for name, each in makers.items()]).encode())
    weights = nn.ModuleDict({name: each for name, each in makers.items() if isinstance(each, nn.Module)})
    for name, tensor in sorted(weights.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
