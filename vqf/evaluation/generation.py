"""Samples of a prior as a protocol asks for them, kept while they are drawn; and the likelihood of held-out ones."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vqf import terminal
from vqf.atomic import write_weights
from vqf.batch import Batch
from vqf.dataloading.loader import keyed
from vqf.dataloading.order import in_batches
from vqf.distributed import comm
from vqf.distributed.engine import Engine, seed_everything
from vqf.evaluation.feature_cache import Pictures, PixelHash
from vqf.evaluation.protocols import digest
from vqf.models.generator import Generator
from vqf.seeding import generator as random_generator
from vqf.terminal import log


@dataclass(frozen=True)
class Told:
    """What this process's part of a batch of samples is told."""

    first: int  # the number of its first sample
    count: int  # samples of the whole batch
    batch: Batch


@dataclass(frozen=True)
class Drawn:
    """A whole batch of samples, in the first process."""

    indices: Tensor  # (B, h, w)
    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,), empty where there are none


class Shelf:
    """A folder that keeps the codes of a long evaluation until it is done, so that a killed one goes on.

    Args:
        folder: Of all shelves.
        facts: Whatever the codes depend on; other facts are another shelf.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder / digest(json.loads(json.dumps(facts, default=str)))

    def get(self, number: int) -> Tensor | None:
        """Return the codes of a batch, if they are there."""
        try:
            return load_file(self._path(number))["indices"].long()
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, number: int, indices: Tensor) -> None:
        """Keep the codes of a batch; where there is no room, they will be drawn again."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self._path(number).with_suffix(".tmp")
            write_weights({"indices": indices.int().cpu()}, unfinished)
            unfinished.replace(self._path(number))
        except OSError as error:
            log.debug("%s: %s", self.folder, error)

    def clear(self) -> None:
        """Forget them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def samples(
    protocol: Any, generator: Generator, held_out: Pictures, count: int, engine: Engine, shelf: Shelf
) -> Iterator[Drawn]:
    """Draw so many samples, batch by batch; of several processes each draws a part, and the first gets all of them."""
    for number, told in enumerate(conditions(protocol, generator, held_out, count)):
        known = shelf.get(number) if comm.first() else None
        if comm.same(known is not None):
            indices = known
        else:
            indices = comm.collect(_codes(generator, told, protocol.seed, engine), told.count)
            if indices is not None:
                shelf.put(number, indices)
        labels = told.batch.labels
        whole = None if labels is None else comm.collect(labels.to(engine.device), told.count)
        if indices is not None:
            images = _decoded(generator, indices.to(engine.device), engine)
            yield Drawn(indices, images, torch.zeros(0) if whole is None else whole.cpu())


def conditions(protocol: Any, generator: Generator, held_out: Pictures, count: int) -> Iterator[Told]:
    """Yield what samples are told, in batches, of each this process's part."""
    numbers = in_batches(range(count), held_out.batch_size)
    if protocol.labels == "pictures":
        most = len(held_out.split)  # of fewer samples than pictures, spread evenly
        keys = [(0, i * most // count if count < most else i % most) for i in range(count)]
        parts = [[keys[i] for i in part] for part in numbers]
        batches = keyed(held_out.split, parts, workers=held_out.workers, timeout=held_out.timeout)
    else:
        labels = _labels(protocol, max(len(generator.classes), 1), count)
        batches = iter(Batch(labels=labels[part]) for part in numbers)
    with terminal.progress("sample", count) as bar:
        for part, batch in zip(numbers, batches, strict=True):
            now = min(len(part) * comm.world(), bar.left)
            yield Told(part[0], now, batch)
            bar.advance(now)


def _labels(protocol: Any, classes: int, count: int) -> Tensor:
    if protocol.labels == "uniform":
        return torch.randint(classes, (count,), generator=random_generator(protocol.seed, "labels"))
    return torch.arange(count) % classes


@torch.no_grad()
def _codes(generator: Generator, told: Told, seed: int, engine: Engine) -> Tensor:
    """Draw codes (B, h, w)."""
    height, width = generator.tokenizer.grid
    with engine.autocast():
        tokens = generator.sample_tokens(told.batch, seed=seed, first=told.first)
    return rearrange(tokens, "b (h w) -> b h w", h=height, w=width)


@torch.no_grad()
def _decoded(generator: Generator, indices: Tensor, engine: Engine) -> Tensor:
    """Turn codes into pictures (B, 3, H, W)."""
    with engine.autocast():
        return generator.tokenizer.decode(indices).float()


@torch.no_grad()
def likelihood(generator: Generator, held_out: Pictures, engine: Engine) -> tuple[str, float]:
    """Return the hash of pictures, and the nats per token of their codes given what the prior is told of them."""
    pixels, total = PixelHash(held_out.rounding), torch.zeros((), device=engine.device)
    seed_everything(0, "likelihood")  # a prior may draw what it is asked
    for batch, count in held_out.parts("likelihood"):
        assert batch.images is not None
        whole = comm.collect(batch.images, count)
        if whole is not None:
            pixels.add(whole)
        own = min(max(count - comm.rank() * len(batch), 0), len(batch))  # the rest fills up the last batch
        if own:
            mine = batch.part(0, own)
            assert mine.images is not None
            with engine.autocast():
                tokens, told = generator.tokenizer.tokens(mine.images), generator.conditioner.prepare(mine)
                total += generator.prior.loss(tokens, generator.conditioner(told)).float() * own
    return pixels.result(), float(comm.total(total)) / held_out.count


def spread(labels: Tensor, classes: int) -> str:
    """Word how many samples a class has."""
    if not len(labels) or not classes:
        return "no classes"
    counts = torch.bincount(labels, minlength=classes)
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def lines(node: DictConfig, sampler: object) -> dict[str, Any]:
    """Return a sampler's name and options, but those of its speed, as lines of a protocol: sampler, sampler.top_k."""
    options = OmegaConf.to_container(node, resolve=True)
    assert isinstance(options, dict)
    kept = {str(key): each for key, each in options.items() if key not in getattr(sampler, "speed_options", ())}
    return {"sampler" if key == "name" else f"sampler.{key}": each for key, each in kept.items()}
