"""Cached tokens: what stage 2 trains on, made once from a data source by one tokenizer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vqf import terminal
from vqf.errors import UserError
from vqf.pipelines.engine import Engine
from vqf.pipelines.loader import Order, keyed
from vqf.protocols import Batch, Split
from vqf.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tokens:
    """The tokens of a split.

    A view is one epoch's augmentation of every picture; epoch e trains on view e modulo their number.
    """

    tokens: Tensor  # (views, pictures, N) int32: half the memory, and vocabularies stay below 2**31
    labels: Tensor | None  # (pictures,) int64

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
        return Batch(labels=labels, tokens=self.tokens[views, indices].long())


def tokenize(
    tokenizer: Tokenizer, split: Split, path: Path, *, views: int, batch_size: int, workers: int, engine: Engine
) -> Tokens:
    """Read the tokens of a split from `path`, or make them and write them there.

    Raises:
        UserError: If `path` holds the tokens of another tokenizer, or of other pictures.
    """
    origin = {"tokenizer": tokenizer.fingerprint(), "data": split.fingerprint, "views": str(views)}
    if path.is_file():
        return _read(path, origin)
    pieces, labels = [], []
    with terminal.progress(f"tokenize {path.stem}", views * len(split)) as bar:
        for batch in _all_views(split, views, batch_size, workers):
            assert batch.images is not None
            with torch.no_grad(), engine.autocast():
                pieces.append(tokenizer.tokens(batch.images.to(engine.device)).to("cpu", torch.int32))
            if batch.labels is not None:
                labels.append(batch.labels)
            bar.advance(len(batch))
    tokens = torch.cat(pieces).unflatten(0, (views, len(split)))
    result = Tokens(tokens, torch.cat(labels)[: len(split)] if labels else None)
    _write(path, result, origin)
    return result


def _all_views(split: Split, views: int, batch_size: int, workers: int) -> Iterator[Batch]:
    keys = [(view, index) for view in range(views) for index in range(len(split))]
    return keyed(split, [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)], workers=workers)


def _write(path: Path, tokens: Tokens, origin: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"tokens": tokens.tokens.contiguous()}
    if tokens.labels is not None:
        tensors["labels"] = tokens.labels
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=origin)
    temporary.rename(path)


def _read(path: Path, origin: dict[str, str]) -> Tokens:
    with safe_open(path, "pt") as file:
        found = file.metadata() or {}
        for key, value in origin.items():
            if found.get(key) != value:
                raise UserError(
                    f"tokens.root: {path} was made with {key} {found.get(key)}, this run has {value}; "
                    f"tokens of another {key} mean something else. Leave tokens.root out and they are made anew"
                )
        return Tokens(file.get_tensor("tokens"), file.get_tensor("labels") if "labels" in file.keys() else None)  # noqa: SIM118
