"""Samples of a prior by a protocol."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
from vqf.distributed.threads import cpu_threads
from vqf.evaluation.evaluation_images import EvaluationImages, PixelHash
from vqf.evaluation.protocols import stable_hash
from vqf.models.generator import Generator
from vqf.protocols import HasSpeedOptions, Sampler
from vqf.seeding import seeded_generator
from vqf.terminal import log


@dataclass(frozen=True)
class SampleRequest:
    """This rank's share of a batch's conditions."""

    first_index: int  # of the first sample of the share, over all samples
    count: int  # samples of the batch over all ranks
    batch: Batch


@dataclass(frozen=True)
class GeneratedBatch:
    """A batch of samples of all ranks."""

    tokens: Tensor  # (B, T)
    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,); empty without labels


class SampleCache:
    """Tokens of generated batches on disk, to resume an evaluation.

    The hash of `facts`, everything that the samples depend on, names the cache.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder / stable_hash(json.loads(json.dumps(facts, default=str)))

    def get(self, batch_index: int) -> Tensor | None:
        try:
            return load_file(self._path(batch_index))["tokens"]
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, batch_index: int, tokens: Tensor) -> None:
        try:
            with atomic_path(self._path(batch_index)) as temporary:
                write_weights({"tokens": tokens.cpu()}, temporary)
        except OSError as error:
            log.debug("%s: %s", self.folder, error)

    def clear(self) -> None:
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
    """Draw `count` samples; the main process yields those of all ranks."""
    for i, request in enumerate(sample_requests(protocol, generator, validation_images, count)):
        cached = cache.get(i) if comm.is_main() else None
        if comm.broadcast_object(cached is not None):
            tokens = cached
        else:
            tokens = comm.gather_rows(_sample_tokens(generator, request, protocol.seed, engine), request.count)
            if tokens is not None:
                cache.put(i, tokens)
        labels = request.batch.labels
        if labels is not None:
            labels = comm.gather_rows(labels.to(engine.device), request.count)
        if tokens is not None:
            images = _decode(generator, tokens.to(engine.device), engine)
            yield GeneratedBatch(tokens, images, torch.zeros(0) if labels is None else labels.cpu())


def sample_requests(
    protocol: Any, generator: Generator, validation_images: EvaluationImages, count: int
) -> Iterator[SampleRequest]:
    """Yield this rank's conditions."""
    index_batches = batches_for_rank(range(count), validation_images.batch_size)
    if protocol.labels == "images":
        size = len(validation_images.split)
        keys = [(0, i * size // count if count < size else i % size) for i in range(count)]  # fewer are spread evenly
        key_batches = [[keys[i] for i in indices] for indices in index_batches]
        batches = keyed_batches(
            validation_images.split, key_batches, workers=validation_images.workers, timeout=validation_images.timeout
        )
    else:
        labels = _request_labels(protocol, max(len(generator.classes), 1), count)
        batches = iter(Batch(labels=labels[indices]) for indices in index_batches)
    with terminal.progress("sample", count) as bar:
        for indices, batch in zip(index_batches, batches, strict=True):
            total = min(len(indices) * comm.world_size(), bar.remaining)
            yield SampleRequest(indices[0], total, batch)
            bar.advance(total)


def _request_labels(protocol: Any, classes: int, count: int) -> Tensor:
    if protocol.labels == "uniform":
        return torch.randint(classes, (count,), generator=seeded_generator(protocol.seed, "labels"))
    return torch.arange(count) % classes


@cpu_threads.watch("sample")
@torch.no_grad()
def _sample_tokens(generator: Generator, request: SampleRequest, seed: int, engine: Engine) -> Tensor:
    with engine.autocast():
        return generator.sample_tokens(request.batch, seed=seed, first=request.first_index)


@torch.no_grad()
def _decode(generator: Generator, tokens: Tensor, engine: Engine) -> Tensor:
    with engine.autocast():
        return generator.tokenizer.decode_tokens(tokens).float()


@torch.no_grad()
def validation_loss(generator: Generator, validation_images: EvaluationImages, engine: Engine) -> tuple[str, float]:
    """Return the pixel hash of images, and the prior's mean loss."""
    pixels, total = PixelHash(validation_images.rounding), torch.zeros((), device=engine.device)
    seed_everything(0, "likelihood")  # the loss of a prior may be stochastic
    for batch, count in validation_images.local_batches("likelihood"):
        assert batch.images is not None
        gathered = comm.gather_rows(batch.images, count)
        if gathered is not None:
            pixels.update(gathered)
        valid = min(max(count - comm.rank() * len(batch), 0), len(batch))  # the last batch is padded
        if valid:
            share = batch.slice(0, valid)
            assert share.images is not None
            with engine.autocast():
                tokens = generator.tokenizer.encode_tokens(share.images)
                prefix = generator.conditioner(generator.conditioner.prepare(share))
                total += generator.prior.loss(tokens, prefix).float() * valid
    return pixels.hexdigest(), float(comm.all_reduce_sum(total)) / validation_images.count


def class_counts(labels: Tensor, classes: int) -> str:
    """Return the samples of a class, such as "97 to 103"."""
    if not len(labels) or not classes:
        return "no classes"
    counts = torch.bincount(labels, minlength=classes)
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def sampler_lines(node: DictConfig, sampler: Sampler) -> dict[str, Any]:
    """Return a sampler's options without `speed_options`."""
    options = OmegaConf.to_container(node, resolve=True)
    assert isinstance(options, dict)
    speed_options = sampler.speed_options if isinstance(sampler, HasSpeedOptions) else frozenset()
    kept = {str(key): value for key, value in options.items() if key not in speed_options}
    return {"sampler" if key == "name" else f"sampler.{key}": value for key, value in kept.items()}
