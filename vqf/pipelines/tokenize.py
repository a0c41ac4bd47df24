"""Any data source into shards of tokens, in any number of processes: before stage 2, or as the first thing it does."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

from vqf import ranks, terminal
from vqf.conditions import Conditions
from vqf.errors import UserError
from vqf.pipelines.common import image_size
from vqf.pipelines.engine import Engine, make_engine
from vqf.pipelines.faults import agree
from vqf.pipelines.files import open_parts
from vqf.pipelines.inherit import given, inherit
from vqf.pipelines.loader import keyed
from vqf.pipelines.restore import build_conditions, find_tokenizer, load_tokenizer
from vqf.pipelines.tokens import CODES, Manifest, Tokens
from vqf.protocols import Batch, Split
from vqf.registry import register
from vqf.settings import written
from vqf.terminal import log
from vqf.tokenizer import Tokenizer


@register("pipeline", "tokenize")
class Tokenize:
    """Write the tokens of `data` into shards in `tokens.root`, which `pipeline=stage2 tokens.root=...` trains on.

    `run` is the run of the tokenizer; data and conditions are its own unless others are named. Each of several
    processes writes other shards. Those that an earlier run finished are kept if their hash is right; a run that is
    killed leaves none half-written.

    Args:
        rows: Views of pictures in a shard: 4096 by default, or as many as the folder began with.
    """

    parallel = True

    def __init__(self, config: DictConfig, run_dir: Path, *, rows: int | None = None) -> None:
        if rows is not None and rows < 1:
            raise ValueError(f"rows={rows}: a shard has at least one")
        self.config, self.run_dir, self.rows = config, run_dir, rows

    def run(self) -> None:
        """Write `<part>-00000.safetensors` and so on, and `<part>.json`, for training and validation."""
        checkpoint = find_tokenizer(self.config.run)
        config = inherit(self.config, checkpoint.config, ["data", "model.conditioner"])
        engine = make_engine(config)
        tokenizer = engine.place(load_tokenizer(checkpoint))
        check_size(config, tokenizer)
        with open_dict(config):
            config.image_size = list(tokenizer.image_size)
        data, parts = open_parts(config)
        torch.manual_seed(config.seed)  # as stage 2 does: a condition may have weights
        conditions = build_conditions(config, tokenizer, data.classes).to(engine.device)
        folder = token_folder(config, self.run_dir)
        for part, split in parts.items():
            found = tokenize_part(Coder(tokenizer, conditions, engine), split, part, folder, config, self.rows)
            log.info("%s: %d views of %d pictures in %d shards", part, found.views, len(found), len(found.shards))
        log.info("%s", folder)


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
    missing = ranks.same(manifest.missing() if ranks.first() else [])
    if missing:
        _make(manifest, missing, coder, split, config)
    return manifest.open()


def _make(manifest: Manifest, missing: list[int], coder: Coder, split: Split, config: DictConfig) -> None:
    """Make shards, as many at a time as there are processes, and record them: what is killed loses these at most."""
    mine, world = missing[ranks.rank() :: ranks.world()], ranks.world()
    keys = (batch for number in mine for batch in manifest.keys(number, config.batch_size))
    batches = keyed(split, keys, workers=config.workers, timeout=config.worker_timeout)
    if ranks.first():
        manifest.add({})
    ranks.wait()  # the folder is there
    done = manifest.total - sum(map(manifest.size, missing))
    with terminal.progress(f"tokenize {manifest.part}", manifest.total, done) as bar:
        for first in range(0, len(missing), world):
            now = missing[first : first + world]
            digest = bytes(32)
            if ranks.rank() < len(now):
                number = now[ranks.rank()]
                count = -(-manifest.size(number) // config.batch_size)
                pieces = _watched(islice(batches, count), bar, len(now))
                digest = bytes.fromhex(manifest.write(number, _joined(map(coder, pieces))))
            hashes = ranks.collect(torch.tensor([list(digest)], dtype=torch.uint8), len(now))
            if hashes is not None:
                manifest.add({number: bytes(each).hex() for number, each in zip(now, hashes.tolist(), strict=True)})
            agree(split)
    ranks.wait()  # all of them are written


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
