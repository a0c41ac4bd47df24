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
from vqf.atomic import atomic_path, write_weights
from vqf.batch import Batch
from vqf.dataloading.loader import keyed_batches
from vqf.dataloading.order import batches_for_rank
from vqf.distributed import comm
from vqf.distributed.engine import Engine, seed_everything
from vqf.evaluation.feature_cache import EvaluationImages, PixelHash
from vqf.evaluation.protocols import stable_hash
from vqf.models.generator import Generator
from vqf.seeding import seeded_generator as random_generator
from vqf.terminal import log


@dataclass(frozen=True)
class SampleRequest:
    """What this process's part of a batch of samples is told."""

    first_index: int  # the number of its first sample
    count: int  # samples of the whole batch
    batch: Batch


@dataclass(frozen=True)
class GeneratedBatch:
    """A whole batch of samples, in the first process."""

    indices: Tensor  # (B, h, w)
    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,), empty where there are none


class SampleCache:
    """A folder that keeps the codes of a long evaluation until it is done, so that a killed one goes on.

    Args:
        folder: Of all shelves.
        facts: Whatever the codes depend on; other facts are another shelf.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder / stable_hash(json.loads(json.dumps(facts, default=str)))

    def get(self, batch_index: int) -> Tensor | None:
        """Return the codes of a batch, if they are there."""
        try:
            return load_file(self._path(batch_index))["indices"].long()
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, batch_index: int, indices: Tensor) -> None:
        """Keep the codes of a batch; where there is no room, they will be drawn again."""
        try:
            with atomic_path(self._path(batch_index)) as temporary:
                write_weights({"indices": indices.int().cpu()}, temporary)
        except OSError as error:
            log.debug("%s: %s", self.folder, error)

    def clear(self) -> None:
        """Forget them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, batch_index: int) -> Path:
        return self.folder / f"{batch_index:06d}.safetensors"


def generate(
    protocol: Any,
    generator: Generator,
    validation_images: EvaluationImages,
    count: int,
    engine: Engine,
    cache: SampleCache,
) -> Iterator[GeneratedBatch]:
    """Draw so many samples, batch by batch; of several processes each draws a part, and the first gets all of them."""
    for number, told in enumerate(sample_requests(protocol, generator, validation_images, count)):
        known = cache.get(number) if comm.is_main() else None
        if comm.broadcast_object(known is not None):
            indices = known
        else:
            indices = comm.gather_rows(_sample_indices(generator, told, protocol.seed, engine), told.count)
            if indices is not None:
                cache.put(number, indices)
        labels = told.batch.labels
        whole = None if labels is None else comm.gather_rows(labels.to(engine.device), told.count)
        if indices is not None:
            images = _decode(generator, indices.to(engine.device), engine)
            yield GeneratedBatch(indices, images, torch.zeros(0) if whole is None else whole.cpu())


def sample_requests(
    protocol: Any, generator: Generator, validation_images: EvaluationImages, count: int
) -> Iterator[SampleRequest]:
    """Yield what samples are told, in batches, of each this process's part."""
    numbers = batches_for_rank(range(count), validation_images.batch_size)
    if protocol.labels == "images":
        most = len(validation_images.split)  # of fewer samples than images, spread evenly
        keys = [(0, i * most // count if count < most else i % most) for i in range(count)]
        parts = [[keys[i] for i in part] for part in numbers]
        batches = keyed_batches(
            validation_images.split, parts, workers=validation_images.workers, timeout=validation_images.timeout
        )
    else:
        labels = _request_labels(protocol, max(len(generator.classes), 1), count)
        batches = iter(Batch(labels=labels[part]) for part in numbers)
    with terminal.progress("sample", count) as bar:
        for part, batch in zip(numbers, batches, strict=True):
            now = min(len(part) * comm.world_size(), bar.remaining)
            yield SampleRequest(part[0], now, batch)
            bar.advance(now)


def _request_labels(protocol: Any, classes: int, count: int) -> Tensor:
    if protocol.labels == "uniform":
        return torch.randint(classes, (count,), generator=random_generator(protocol.seed, "labels"))
    return torch.arange(count) % classes


@torch.no_grad()
def _sample_indices(generator: Generator, request: SampleRequest, seed: int, engine: Engine) -> Tensor:
    """Draw codes (B, h, w)."""
    height, width = generator.tokenizer.grid
    with engine.autocast():
        tokens = generator.sample_tokens(request.batch, seed=seed, first=request.first_index)
    return rearrange(tokens, "b (h w) -> b h w", h=height, w=width)


@torch.no_grad()
def _decode(generator: Generator, indices: Tensor, engine: Engine) -> Tensor:
    """Turn codes into images (B, 3, H, W)."""
    with engine.autocast():
        return generator.tokenizer.decode(indices).float()


@torch.no_grad()
def nats_per_token(generator: Generator, validation_images: EvaluationImages, engine: Engine) -> tuple[str, float]:
    """Return the hash of images, and the nats per token of their codes given what the prior is told of them."""
    pixels, total = PixelHash(validation_images.rounding), torch.zeros((), device=engine.device)
    seed_everything(0, "likelihood")  # a prior may draw what it is asked
    for batch, count in validation_images.local_batches("likelihood"):
        assert batch.images is not None
        whole = comm.gather_rows(batch.images, count)
        if whole is not None:
            pixels.update(whole)
        own = min(max(count - comm.rank() * len(batch), 0), len(batch))  # the rest fills up the last batch
        if own:
            mine = batch.slice(0, own)
            assert mine.images is not None
            with engine.autocast():
                tokens, told = generator.tokenizer.encode_tokens(mine.images), generator.conditioner.prepare(mine)
                total += generator.prior.loss(tokens, generator.conditioner(told)).float() * own
    return pixels.hexdigest(), float(comm.all_reduce_sum(total)) / validation_images.count


def class_counts(labels: Tensor, classes: int) -> str:
    """Word how many samples a class has."""
    if not len(labels) or not classes:
        return "no classes"
    counts = torch.bincount(labels, minlength=classes)
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def sampler_lines(node: DictConfig, sampler: object) -> dict[str, Any]:
    """Return a sampler's name and options, but those of its speed, as lines of a protocol: sampler, sampler.top_k."""
    options = OmegaConf.to_container(node, resolve=True)
    assert isinstance(options, dict)
    kept = {str(key): each for key, each in options.items() if key not in getattr(sampler, "speed_options", ())}
    return {"sampler" if key == "name" else f"sampler.{key}": each for key, each in kept.items()}
