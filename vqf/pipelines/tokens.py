"""Cached tokens: what stage 2 trains on, made once from a data source by one tokenizer."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqf import ranks, terminal
from vqf.conditions import Conditions
from vqf.errors import UserError
from vqf.pipelines.atomic import write_weights
from vqf.pipelines.engine import Engine
from vqf.pipelines.loader import Order, in_batches, keyed
from vqf.protocols import Batch, Split
from vqf.tokenizer import Tokenizer

CODES = "codes."  # in front of the name of a condition


@dataclass(frozen=True)
class Tokens:
    """The tokens of a split.

    A view is one epoch's augmentation of every picture; epoch e trains on view e modulo their number.
    """

    tokens: Tensor  # (views, pictures, N) int32: half the memory, and vocabularies stay below 2**31
    labels: Tensor | None  # (pictures,) int64
    places: Tensor | None = None  # (views, pictures, 4) float
    codes: Mapping[str, Tensor] = field(default_factory=dict)  # (views, pictures, h, w) int32, of conditions

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def batches(self, order: Order, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps `start` to `stop` - 1."""
        for step in range(start, stop):
            keys = order.batch(step)
            yield self.pick([epoch for epoch, _ in keys], [index for _, index in keys])

    def pick(self, epochs: list[int], indices: list[int]) -> Batch:
        """Return the batch of some pictures, as they look in some epochs."""
        views = [epoch % len(self.tokens) for epoch in epochs]
        labels = None if self.labels is None else self.labels[indices]
        places = None if self.places is None else self.places[views, indices]
        codes = {name: each[views, indices].long() for name, each in self.codes.items()}
        return Batch(labels=labels, tokens=self.tokens[views, indices].long(), places=places, codes=codes)


def tokenize(
    tokenizer: Tokenizer,
    conditions: Conditions,
    split: Split,
    path: Path,
    *,
    views: int,
    batch_size: int,
    workers: int,
    engine: Engine,
) -> Tokens:
    """Read the tokens of a split, and the codes of its conditions, from `path`, or make them and write them there.

    Raises:
        UserError: If `path` holds the tokens of another tokenizer, of other conditions, or of other pictures.
    """
    origin = {"tokenizer": tokenizer.fingerprint(), "data": split.fingerprint, "views": str(views)}
    origin["conditions"] = _fingerprint(conditions)
    if ranks.same(path.is_file()):
        return _read(path, origin)
    pieces: dict[str, list[Tensor]] = defaultdict(list)
    with terminal.progress(f"tokenize {path.stem}", views * len(split)) as bar:
        for batch in _all_views(split, views, batch_size, workers):
            now = min(len(batch) * ranks.world(), bar.left)
            for name, piece in _pieces(tokenizer, conditions, batch.to(engine.device), engine).items():
                if (whole := ranks.collect(piece, now)) is not None:
                    pieces[name].append(whole)
            bar.advance(now)
    if not ranks.first():
        ranks.wait()
        return _read(path, origin)
    found = {name: torch.cat(each).unflatten(0, (views, len(split))) for name, each in pieces.items()}
    if "labels" in found:
        found["labels"] = found["labels"][0].contiguous()
    _write(path, found, origin)
    ranks.wait()  # the others read what is written now
    return _gather(found)


def _pieces(tokenizer: Tokenizer, conditions: Conditions, batch: Batch, engine: Engine) -> dict[str, Tensor]:
    """Return what is kept of a batch, under the names that the file has."""
    assert batch.images is not None
    with torch.no_grad(), engine.autocast():
        tokens, told = tokenizer.tokens(batch.images), conditions.prepare(batch)
    kept = {"tokens": tokens.int(), "labels": told.labels, "places": told.places}
    kept |= {f"{CODES}{name}": each.int() for name, each in told.codes.items()}
    return {name: each.cpu() for name, each in kept.items() if each is not None}


def _gather(found: Mapping[str, Tensor]) -> Tokens:
    codes = {name.removeprefix(CODES): each for name, each in found.items() if name.startswith(CODES)}
    return Tokens(found["tokens"], found.get("labels"), found.get("places"), codes)


def _fingerprint(conditions: Conditions) -> str:
    """Hash the weights of every tokenizer that makes codes of conditions, and which conditions there are."""
    digest = hashlib.sha256(repr([(name, each.length) for name, each in conditions.parts.items()]).encode())
    for name, tensor in sorted(conditions.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _all_views(split: Split, views: int, batch_size: int, workers: int) -> Iterator[Batch]:
    keys = [(view, index) for view in range(views) for index in range(len(split))]
    return keyed(split, in_batches(keys, batch_size), workers=workers)


def _write(path: Path, tensors: dict[str, Tensor], origin: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        write_weights(tensors, temporary, origin)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"tokens.root: {path} cannot be written: {error.strerror}; make room, or name another"
        ) from error
    temporary.replace(path)


def _read(path: Path, origin: dict[str, str]) -> Tokens:
    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise UserError(f"tokens.root: {path} is damaged ({error}); delete it, and it is made anew") from error
    with opened as file:
        found = file.metadata() or {}
        for key, value in origin.items():
            if found.get(key) != value:
                raise UserError(
                    f"tokens.root: {path} was made with {key} {found.get(key)}, this run has {value}; "
                    f"tokens of another {key} mean something else. Leave tokens.root out and they are made anew"
                )
        return _gather({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
