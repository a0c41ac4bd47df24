"""Measure a finished run by a protocol with a name, and keep the numbers with every fact that they depend on."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vqf.config.access import chosen
from vqf.config.inherit import inherit
from vqf.distributed import comm
from vqf.distributed.engine import Engine, make_engine
from vqf.errors import UserError
from vqf.evaluation import generation, reconstruction, result
from vqf.evaluation.context import Bench
from vqf.evaluation.feature_cache import PixelHash, Statistics, collect
from vqf.evaluation.image_panels import Album
from vqf.evaluation.preprocessing import rounded
from vqf.evaluation.reconstruction import NUMBERS_OF_PRIORS
from vqf.evaluation.result import Measurement
from vqf.models.generator import Generator
from vqf.pipelines.report import refresh
from vqf.protocols import Comparison, EvaluationProtocol, Reconstruction
from vqf.registry import build, register
from vqf.runs.checkpoint import Checkpoint, every_checkpoint, locate, run_folder
from vqf.runs.load import find_generator, find_tokenizer, load_generator, load_tokenizer
from vqf.runs.provenance import Meter
from vqf.runs.run_logger import start_run
from vqf.terminal import log

MOST = 50_000  # samples where a protocol asks for as many as the reference has
SHOWN = 64  # samples in a grid
PLAIN = {"stage1": "reconstruction", "stage2": "generation"}  # protocols, where none is chosen
OFFLINE = ["psnr", "ssim", "features", "usage", "fd_lite2", "kd_lite2", "prdc_lite2"]
INHERITED = ["data", "subject", "image_size", "batch_size", "sampler"]


@register("pipeline", "evaluate", defaults=[{"override /metric": OFFLINE}])
class Evaluate:
    """Measure a run: reconstructions of a tokenizer, or samples of a prior, by the protocol that is chosen.

    Writes `evaluations/<protocol>-<hash>/<stage>-<step>/metrics.json` below the run, and a copy into its own folder.

    Args:
        statistics: A folder for what networks see in real pictures, and for samples of an evaluation that is not
            finished; by default `vqf/statistics` in the cache folder of the user.
        checkpoints: `one`, the newest of the run or the one that is named; or `all` of the run, one after the other.
    """

    parallel = True

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        statistics: str | None = None,
        checkpoints: Literal["one", "all"] = "one",
    ) -> None:
        self.config, self.run_dir, self.checkpoints = config, run_dir, checkpoints
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "vqf" / "statistics" if statistics is None else Path(statistics).expanduser()
        self.statistics = Statistics(folder)

    def run(self) -> None:
        """Measure, print a table, write the file."""
        meter = Meter()
        checkpoints, node = self._open()
        config = inherit(self.config, checkpoints[0].config, INHERITED)
        config.protocol = node
        engine = make_engine(config)
        found = [self._measure(each, config, engine) for each in checkpoints]
        with start_run(config, self.run_dir, meter) as journal:
            for checkpoint, each in zip(checkpoints, found, strict=True):
                journal.scalars(checkpoint.step, {f"evaluation/{key}": value for key, value in each.values.items()})
            for name, images in found[-1].grids.items():
                journal.images(checkpoints[-1].step, name, images)
            journal.details(found[-1].details)
        if comm.first():
            refresh(run_folder(checkpoints[-1].path), config)

    def _open(self) -> tuple[list[Checkpoint], DictConfig]:
        """Find the checkpoints and the protocol: the one that is chosen, or the plain one of what the run holds."""
        path, node = self.config.run, self.config.protocol
        if node is None:
            checkpoint = locate(path, lambda _: True, "a run of vqf", "train one with python -m vqf.run")
            node = OmegaConf.create({"name": PLAIN[checkpoint.kind]})
        else:
            task = build("protocol", node).task
            checkpoint = (find_tokenizer if task == "reconstruction" else find_generator)(path)
        if self.checkpoints == "one":
            return [checkpoint], node
        return every_checkpoint(run_folder(checkpoint.path)), node

    def _measure(self, checkpoint: Checkpoint, config: DictConfig, engine: Engine) -> Measurement:
        """Measure a checkpoint, and write down what was found."""
        meter = Meter()
        protocol: EvaluationProtocol = build("protocol", config.protocol)
        if protocol.task == "reconstruction":
            found = self._reconstructions(checkpoint, config, protocol, engine)
        else:
            found = self._samples(checkpoint, config, protocol, engine)
        if comm.first():
            facts = result.circumstances(meter.seconds, str(engine.device))
            found.tell()
            run = run_folder(Path(config.run).expanduser())
            log.info("%s", result.save(found, checkpoint, facts, run, self.run_dir))
        return found

    def _reconstructions(
        self, checkpoint: Checkpoint, config: DictConfig, protocol: EvaluationProtocol, engine: Engine
    ) -> Measurement:
        if not chosen(config, "metric"):
            raise UserError(f"metric=[]: nothing to measure; give metric=[{','.join(OFFLINE)}], or some of them")
        bench = Bench(config, protocol, engine.place(load_tokenizer(checkpoint)), engine, self.statistics)
        bench.check(checkpoint)
        return reconstructions(bench)

    def _samples(
        self, checkpoint: Checkpoint, config: DictConfig, protocol: EvaluationProtocol, engine: Engine
    ) -> Measurement:
        generator = load_generator(checkpoint, config.sampler).to(engine.device)
        bench = Bench(config, protocol, generator.tokenizer, engine, self.statistics)
        bench.check(checkpoint)
        return samples(bench, generator, result.mark(checkpoint))


def reconstructions(bench: Bench) -> Measurement:
    """Send the pictures of a protocol through a tokenizer and back; compare them one by one, and as a set.

    Of several processes each reconstructs a part, and the first has what was found.
    """
    protocol, found, tokenizer = bench.protocol, Measurement(), bench.tokenizer
    reference, pictures = bench.reference(), bench.pictures(protocol.part, protocol.count)
    pixels, album = PixelHash(protocol.rounding), Album(tokenizer.vocab_size, bench.engine.device)

    def drawn() -> Iterator[Tensor]:
        for batch, count in pictures.parts("reconstruct"):
            part = reconstruction.reconstruct(tokenizer, batch, bench.engine)
            part.reconstructions = rounded(part.reconstructions, protocol.rounding)
            whole = reconstruction.collected(part, count)
            if whole is not None:
                pixels.add(whole.images)
                for metric in (album, *bench.others.values()):
                    metric.update(whole)
                yield whole.reconstructions

    generated = collect(drawn(), bench.networks, pictures.count)
    if reference is None:
        reference = bench.statistics.of_pictures(pictures, pixels.result(), bench.networks)
    if not comm.first():
        return found
    bench.finish(found, bench.others)
    bench.compare(found, reference, generated, pictures.count)
    found.state(bench.facts(pixels.result(), pictures.count, reference))
    found.grids["reconstructions"] = reconstruction.side_by_side(tokenizer, pictures.split, bench.engine)
    found.grids |= album.images()
    found.details = album.details()
    return found


def samples(bench: Bench, generator: Generator, checkpoint: str) -> Measurement:
    """Draw pictures by a protocol and compare them as a set; measure the likelihood of held-out ones.

    Of several processes each draws a part, and the first has what was found.

    Args:
        bench: What is measured with.
        generator: Draws.
        checkpoint: The hash of what it was loaded from.
    """
    protocol: Any = bench.protocol
    found, reference = Measurement(), bench.reference()
    assert reference is not None, "samples have no originals"
    held_out, count = bench.pictures(protocol.part), protocol.count or min(reference.count or MOST, MOST)
    of_codes = {name: metric for name, metric in bench.others.items() if getattr(metric, "codes_only", False)}
    for name in bench.others.keys() - of_codes.keys():
        log.info("metric '%s' compares pictures with their reconstructions: samples have none", name)
    pixels, nats = generation.likelihood(generator, held_out, bench.engine)
    shown, labels = list[Tensor](), list[Tensor]()
    sampled = generation.lines(bench.config.sampler, generator.sampler)
    facts = {"checkpoint": checkpoint, "count": count, "batch": held_out.batch_size, "world": comm.world()}
    facts |= {"device": bench.engine.device.type, "pictures": held_out.seen, **sampled}
    shelf = generation.Shelf(bench.statistics.folder / "samples", facts | bench.lines())

    def drawn() -> Iterator[Tensor]:
        for each in generation.samples(protocol, generator, held_out, count, bench.engine, shelf):
            images = rounded(each.images, protocol.rounding)
            for metric in of_codes.values():
                metric.update(Reconstruction(images, images, each.indices.to(images.device)))
            shown.append(images[: max(SHOWN - sum(map(len, shown)), 0)])
            labels.append(each.labels)
            yield images

    generated = collect(drawn(), bench.networks, count)
    if not comm.first():
        return found
    found.add(None, Comparison({"nats_per_token": nats}), {})
    found.higher_is_better |= NUMBERS_OF_PRIORS
    bench.finish(found, of_codes)
    bench.compare(found, reference, generated, count)
    told_of = {"samples_per_class": generation.spread(torch.cat(labels), len(generator.classes))}
    found.state(bench.facts(pixels, count, reference) | told_of | sampled)
    found.grids["samples"] = torch.cat(shown)
    shelf.clear()
    return found
