"""Measure a finished run by a protocol with a name, and keep the numbers with every fact that they depend on."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vqf import terminal
from vqf.generator import Generator
from vqf.pipelines import evaluation, measurement
from vqf.pipelines.album import Album
from vqf.pipelines.bench import Bench
from vqf.pipelines.checkpoint import Checkpoint, locate, run_folder
from vqf.pipelines.common import start_run
from vqf.pipelines.cost import Meter
from vqf.pipelines.cropping import rounded
from vqf.pipelines.engine import Engine, make_engine, seed_everything
from vqf.pipelines.inherit import inherit
from vqf.pipelines.loader import keyed
from vqf.pipelines.measurement import Measurement
from vqf.pipelines.restore import find_generator, find_tokenizer, load_generator, load_tokenizer
from vqf.pipelines.statistics import Pictures, PixelHash, Statistics, collect
from vqf.protocols import Batch, Comparison, EvaluationProtocol, Reconstruction
from vqf.randomness import generator as random_generator
from vqf.registry import build, register
from vqf.terminal import log

MOST = 50_000  # samples where a protocol asks for as many as the reference has
SHOWN = 64  # samples in a grid
PLAIN = {"stage1": "reconstruction", "stage2": "generation"}  # protocols, where none is chosen
OFFLINE = ["psnr", "ssim", "features", "usage", "fd_lite2", "kd_lite2", "prdc_lite2"]


@register("pipeline", "evaluate", defaults=[{"override /metric": OFFLINE}])
class Evaluate:
    """Measure a run: reconstructions of a tokenizer, or samples of a prior, by the protocol that is chosen.

    Writes `evaluations/<protocol>-<hash>/metrics.json` below the run, and a copy into its own folder.

    Args:
        statistics: A folder for what networks see in real pictures; by default `vqf/statistics` in the cache folder of
            the user.
    """

    def __init__(self, config: DictConfig, run_dir: Path, *, statistics: str | None = None) -> None:
        self.config, self.run_dir = config, run_dir
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "vqf" / "statistics" if statistics is None else Path(statistics).expanduser()
        self.statistics = Statistics(folder)

    def run(self) -> None:
        """Measure, print a table, write the file."""
        meter = Meter()
        checkpoint, node = self._open()
        config = inherit(self.config, checkpoint.config, ["data", "subject", "image_size", "batch_size", "sampler"])
        config.protocol = node
        engine = make_engine(config)
        found = self._measure(checkpoint, config, engine)
        facts = measurement.circumstances(meter.seconds, str(engine.device), str(config.precision))
        with start_run(config, self.run_dir, meter) as journal:
            journal.scalars(checkpoint.step, {f"evaluation/{key}": value for key, value in found.values.items()})
            for name, images in found.grids.items():
                journal.images(checkpoint.step, name, images)
            journal.details(found.details)
        found.tell()
        run = run_folder(Path(config.run).expanduser())
        path = measurement.save(found, measurement.origin(checkpoint), facts, run, self.run_dir)
        log.info("%s", path)

    def _open(self) -> tuple[Checkpoint, DictConfig]:
        """Find the checkpoint and the protocol: the one that is chosen, or the plain one of what the run holds."""
        path, node = self.config.run, self.config.protocol
        if node is None:
            checkpoint = locate(path, lambda _: True, "a run of vqf", "train one with python -m vqf.run")
            return checkpoint, OmegaConf.create({"name": PLAIN[checkpoint.kind]})
        task = build("protocol", node).task
        return (find_tokenizer if task == "reconstruction" else find_generator)(path), node

    def _measure(self, checkpoint: Checkpoint, config: DictConfig, engine: Engine) -> Measurement:
        protocol: EvaluationProtocol = build("protocol", config.protocol)
        if protocol.task == "reconstruction":
            tokenizer = engine.place(load_tokenizer(checkpoint))
            return reconstructions(Bench(config, protocol, tokenizer, engine, self.statistics))
        generator = load_generator(checkpoint, config.sampler).to(engine.device)
        return samples(Bench(config, protocol, generator.tokenizer, engine, self.statistics), generator)


def reconstructions(bench: Bench) -> Measurement:
    """Send the pictures of a protocol through a tokenizer and back; compare them one by one, and as a set."""
    protocol, found, tokenizer = bench.protocol, Measurement(), bench.tokenizer
    reference, pictures = bench.reference(), bench.pictures(protocol.part, protocol.count)
    pixels, album = PixelHash(protocol.rounding), Album(tokenizer.vocab_size, bench.engine.device)

    def drawn() -> Iterator[Tensor]:
        for batch in pictures.batches("reconstruct"):
            pair = evaluation.reconstruct(tokenizer, batch, bench.engine)
            pair.reconstructions = rounded(pair.reconstructions, protocol.rounding)
            pixels.add(pair.images)
            for metric in (album, *bench.others.values()):
                metric.update(pair)
            yield pair.reconstructions

    generated = collect(drawn(), bench.networks, pictures.count)
    if reference is None:
        reference = bench.statistics.of_pictures(pictures, pixels.result(), bench.networks)
    bench.finish(found, bench.others)
    bench.compare(found, reference, generated, pictures.count)
    found.state(bench.facts(pixels.result(), pictures.count, reference))
    found.grids["reconstructions"] = evaluation.side_by_side(tokenizer, pictures.split, bench.engine)
    found.grids |= album.images()
    found.details = album.details()
    return found


def samples(bench: Bench, generator: Generator) -> Measurement:
    """Draw pictures by a protocol and compare them as a set; measure the likelihood of held-out ones."""
    protocol: Any = bench.protocol
    found, reference = Measurement(), bench.reference()
    assert reference is not None, "samples have no originals"
    held_out, count = bench.pictures(protocol.part), protocol.count or min(reference.count or MOST, MOST)
    of_codes = {name: metric for name, metric in bench.others.items() if getattr(metric, "codes_only", False)}
    for name in bench.others.keys() - of_codes.keys():
        log.info("metric '%s' compares pictures with their reconstructions: samples have none", name)
    pixels, nats = likelihood(generator, held_out, bench.engine)
    shown, labels = list[Tensor](), list[Tensor]()

    def drawn() -> Iterator[Tensor]:
        for first, told in conditions(protocol, generator, held_out, count):
            indices, images = draw(generator, told, protocol.seed, first, bench.engine)
            images = rounded(images, protocol.rounding)
            for metric in of_codes.values():
                metric.update(Reconstruction(images, images, indices))
            shown.append(images[: max(SHOWN - first, 0)])
            labels.append(torch.zeros(0) if told.labels is None else told.labels)
            yield images

    generated = collect(drawn(), bench.networks, count)
    found.add(Comparison({"nats_per_token": nats}), {}, {})
    bench.finish(found, of_codes)
    bench.compare(found, reference, generated, count)
    told_of = {"samples_per_class": spread(torch.cat(labels), len(generator.classes))}
    found.state(bench.facts(pixels, count, reference) | told_of | flat(bench.config.sampler, "sampler"))
    found.grids["samples"] = torch.cat(shown)
    return found


def conditions(protocol: Any, generator: Generator, held_out: Pictures, count: int) -> Iterator[tuple[int, Batch]]:
    """Yield what samples are told, in batches, each with the number of its first sample."""
    size, classes = held_out.batch_size, max(len(generator.classes), 1)
    with terminal.progress("sample", count) as bar:
        if protocol.labels == "pictures":
            most = len(held_out.split)  # of fewer samples than pictures, spread evenly
            keys = [(0, i * most // count if count < most else i % most) for i in range(count)]
            batches = keyed(
                held_out.split, [keys[i : i + size] for i in range(0, count, size)], workers=held_out.workers
            )
        else:
            labels = torch.arange(count) % classes
            if protocol.labels == "uniform":
                labels = torch.randint(classes, (count,), generator=random_generator(protocol.seed, "labels"))
            batches = iter(Batch(labels=each) for each in labels.split(size))
        for number, batch in enumerate(batches):
            yield number * size, batch
            bar.advance(len(batch))


@torch.no_grad()
def draw(generator: Generator, told: Batch, seed: int, first: int, engine: Engine) -> tuple[Tensor, Tensor]:
    """Draw codes (B, h, w) and their pictures."""
    height, width = generator.tokenizer.grid
    with engine.autocast():
        tokens = generator.sample_tokens(told, seed=seed, first=first)
        indices = rearrange(tokens, "b (h w) -> b h w", h=height, w=width)
        return indices, generator.tokenizer.decode(indices).float()


@torch.no_grad()
def likelihood(generator: Generator, held_out: Pictures, engine: Engine) -> tuple[str, float]:
    """Return the hash of pictures, and the nats per token of their codes given what the prior is told of them."""
    pixels, total = PixelHash(held_out.rounding), torch.zeros((), device=engine.device)
    seed_everything(0, "likelihood")  # a prior may draw what it is asked
    for batch in held_out.batches("likelihood"):
        assert batch.images is not None
        pixels.add(batch.images)
        with engine.autocast():
            tokens, told = generator.tokenizer.tokens(batch.images), generator.conditioner.prepare(batch)
            total += generator.prior.loss(tokens, generator.conditioner(told)).float() * len(batch)
    return pixels.result(), float(total) / held_out.count


def spread(labels: Tensor, classes: int) -> str:
    """Word how many samples a class has."""
    if not len(labels) or not classes:
        return "no classes"
    counts = torch.bincount(labels, minlength=classes)
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def flat(node: DictConfig, name: str) -> dict[str, Any]:
    """Return a component's name and options as lines of a protocol: sampler, sampler.top_k, ..."""
    options = OmegaConf.to_container(node, resolve=True)
    assert isinstance(options, dict)
    return {name if key == "name" else f"{name}.{key!s}": value for key, value in options.items()}
