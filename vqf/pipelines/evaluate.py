"""Measure a finished run by a protocol with a name, and keep the numbers with every fact that they depend on."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vqf.config.access import group_nodes
from vqf.config.inherit import inherit
from vqf.distributed import comm
from vqf.distributed.engine import Engine, make_engine
from vqf.errors import UserError
from vqf.evaluation import generation, reconstruction, result
from vqf.evaluation.context import EvaluationContext
from vqf.evaluation.evaluation_images import PixelHash
from vqf.evaluation.feature_cache import FeatureStatisticsCache, extract_features
from vqf.evaluation.image_panels import ImagePanels
from vqf.evaluation.preprocessing import round_to_8bit
from vqf.evaluation.reconstruction import PRIOR_METRIC_DIRECTIONS
from vqf.evaluation.result import EvaluationResult
from vqf.models.generator import Generator
from vqf.pipelines.report import refresh_page
from vqf.protocols import EvaluationProtocol, Reconstruction, SetMetricResult
from vqf.registry import build, register
from vqf.runs.checkpoint import Checkpoint, all_checkpoints, find_checkpoint, run_dir_of
from vqf.runs.load import find_generator_checkpoint, find_tokenizer_checkpoint, load_generator, load_tokenizer
from vqf.runs.provenance import ResourceMeter
from vqf.runs.run_logger import start_run
from vqf.terminal import log

MAX_SAMPLES = 50_000  # samples where a protocol asks for as many as the reference has
MAX_PREVIEW_SAMPLES = 64  # samples in a grid
DEFAULT_PROTOCOLS = {"stage1": "reconstruction", "stage2": "generation"}  # protocols, where none is chosen
OFFLINE_METRICS = ["psnr", "ssim", "features", "usage", "fd_lite2", "kd_lite2", "prdc_lite2"]
INHERITED_KEYS = ["data", "target", "image_size", "batch_size", "sampler"]


@register("pipeline", "evaluate", defaults=[{"override /metric": OFFLINE_METRICS}])
class Evaluate:
    """Measure a run: reconstructions of a tokenizer, or samples of a prior, by the protocol that is chosen.

    Writes `evaluations/<protocol>-<hash>/<stage>-<step>/metrics.json` below the run, and a copy into its own folder.

    Args:
        statistics: A folder for what networks see in real images, and for samples of an evaluation that is not
            finished; by default `vqf/statistics` in the cache folder of the user.
        checkpoints: `one`, the newest of the run or the one that is named; or `all` of the run, one after the other.
    """

    distributed = True

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
        self.feature_cache = FeatureStatisticsCache(folder)

    def run(self) -> None:
        """Measure, print a table, write the file."""
        meter = ResourceMeter()
        checkpoints, node = self._open_checkpoints()
        config = inherit(self.config, checkpoints[0].config, INHERITED_KEYS)
        config.protocol = node
        engine = make_engine(config)
        found = [self._evaluate(each, config, engine) for each in checkpoints]
        with start_run(config, self.run_dir, meter) as journal:
            for checkpoint, each in zip(checkpoints, found, strict=True):
                journal.scalars(checkpoint.step, {f"evaluation/{key}": value for key, value in each.values.items()})
            for name, images in found[-1].images.items():
                journal.images(checkpoints[-1].step, name, images)
            journal.write_details(found[-1].details)
        if comm.is_main():
            refresh_page(run_dir_of(checkpoints[-1].path), config)

    def _open_checkpoints(self) -> tuple[list[Checkpoint], DictConfig]:
        """Find the checkpoints and the protocol: the one that is chosen, or the plain one of what the run holds."""
        path, node = self.config.run, self.config.protocol
        if node is None:
            checkpoint = find_checkpoint(path, lambda _: True, "a run of vqf", "train one with python -m vqf.run")
            node = OmegaConf.create({"name": DEFAULT_PROTOCOLS[checkpoint.kind]})
        else:
            task = build("protocol", node).task
            checkpoint = (find_tokenizer_checkpoint if task == "reconstruction" else find_generator_checkpoint)(path)
        if self.checkpoints == "one":
            return [checkpoint], node
        return all_checkpoints(run_dir_of(checkpoint.path)), node

    def _evaluate(self, checkpoint: Checkpoint, config: DictConfig, engine: Engine) -> EvaluationResult:
        """Measure a checkpoint, and write down what was found."""
        meter = ResourceMeter()
        protocol: EvaluationProtocol = build("protocol", config.protocol)
        if protocol.task == "reconstruction":
            found = self._evaluate_reconstructions(checkpoint, config, protocol, engine)
        else:
            found = self._evaluate_samples(checkpoint, config, protocol, engine)
        if comm.is_main():
            facts = result.environment(meter.elapsed_seconds, str(engine.device))
            found.print_table()
            run = run_dir_of(Path(config.run).expanduser())
            log.info("%s", result.save(found, checkpoint, facts, run, self.run_dir))
        return found

    def _evaluate_reconstructions(
        self, checkpoint: Checkpoint, config: DictConfig, protocol: EvaluationProtocol, engine: Engine
    ) -> EvaluationResult:
        if not group_nodes(config, "metric"):
            raise UserError(
                f"metric=[]: nothing to measure; give metric=[{','.join(OFFLINE_METRICS)}], or some of them"
            )
        bench = EvaluationContext(
            config, protocol, engine.prepare(load_tokenizer(checkpoint)), engine, self.feature_cache
        )
        bench.warn_if_validation_changed(checkpoint)
        return evaluate_reconstructions(bench)

    def _evaluate_samples(
        self, checkpoint: Checkpoint, config: DictConfig, protocol: EvaluationProtocol, engine: Engine
    ) -> EvaluationResult:
        generator = load_generator(checkpoint, config.sampler).to(engine.device)
        bench = EvaluationContext(config, protocol, generator.tokenizer, engine, self.feature_cache)
        bench.warn_if_validation_changed(checkpoint)
        return evaluate_samples(bench, generator, result.manifest_sha256(checkpoint))


def evaluate_reconstructions(context: EvaluationContext) -> EvaluationResult:
    """Send the images of a protocol through a tokenizer and back; compare them one by one, and as a set.

    Of several processes each reconstructs a part, and the first has what was found.
    """
    protocol, found, tokenizer = context.protocol, EvaluationResult(), context.tokenizer
    reference, images = context.reference(), context.images(protocol.part, protocol.count)
    pixels, album = PixelHash(protocol.rounding), ImagePanels(tokenizer.vocab_size, context.engine.device)

    def drawn() -> Iterator[Tensor]:
        for batch, count in images.local_batches("reconstruct"):
            part = reconstruction.reconstruct(tokenizer, batch, context.engine)
            part.reconstructions = round_to_8bit(part.reconstructions, protocol.rounding)
            whole = reconstruction.gather_to_main(part, count)
            if whole is not None:
                pixels.update(whole.images)
                for metric in (album, *context.batch_metrics.values()):
                    metric.update(whole)
                yield whole.reconstructions

    generated = extract_features(drawn(), context.feature_networks, images.count)
    if reference is None:
        reference = context.feature_cache.from_images(images, pixels.hexdigest(), context.feature_networks)
    if not comm.is_main():
        return found
    context.add_metrics(found, context.batch_metrics)
    context.add_set_metrics(found, reference, generated, images.count)
    found.set_protocol(context.result_lines(pixels.hexdigest(), images.count, reference))
    found.images["reconstructions"] = reconstruction.side_by_side(tokenizer, images.split, context.engine)
    found.images |= album.images()
    found.details = album.details()
    return found


def evaluate_samples(context: EvaluationContext, generator: Generator, checkpoint_sha256: str) -> EvaluationResult:
    """Draw images by a protocol and compare them as a set; measure the likelihood of held-out ones.

    Of several processes each draws a part, and the first has what was found.

    Args:
        context: What is measured with.
        generator: Draws.
        checkpoint_sha256: The hash of what it was loaded from.
    """
    protocol: Any = context.protocol
    found, reference = EvaluationResult(), context.reference()
    assert reference is not None, "samples have no originals"
    held_out, count = context.images(protocol.part), protocol.count or min(reference.count or MAX_SAMPLES, MAX_SAMPLES)
    metrics = context.batch_metrics.items()
    of_codes = {name: metric for name, metric in metrics if getattr(metric, "indices_only", False)}
    for name in context.batch_metrics.keys() - of_codes.keys():
        log.info("metric '%s' compares images with their reconstructions: samples have none", name)
    pixels, nats = generation.nats_per_token(generator, held_out, context.engine)
    shown, labels = list[Tensor](), list[Tensor]()
    sampled = generation.sampler_lines(context.config.sampler, generator.sampler)
    facts = {"checkpoint": checkpoint_sha256, "count": count, "batch": held_out.batch_size, "world": comm.world_size()}
    facts |= {"device": context.engine.device.type, "images": held_out.source_hash, **sampled}
    shelf = generation.SampleCache(context.feature_cache.folder / "samples", facts | context.protocol_lines())

    def drawn() -> Iterator[Tensor]:
        for each in generation.generate(protocol, generator, held_out, count, context.engine, shelf):
            images = round_to_8bit(each.images, protocol.rounding)
            for metric in of_codes.values():
                metric.update(Reconstruction(images, images, each.indices.to(images.device)))
            shown.append(images[: max(MAX_PREVIEW_SAMPLES - sum(map(len, shown)), 0)])
            labels.append(each.labels)
            yield images

    generated = extract_features(drawn(), context.feature_networks, count)
    if not comm.is_main():
        return found
    found.add(None, SetMetricResult({"nats_per_token": nats}), {})
    found.higher_is_better |= PRIOR_METRIC_DIRECTIONS
    context.add_metrics(found, of_codes)
    context.add_set_metrics(found, reference, generated, count)
    told_of = {"samples_per_class": generation.class_counts(torch.cat(labels), len(generator.classes))}
    found.set_protocol(context.result_lines(pixels, count, reference) | told_of | sampled)
    found.images["samples"] = torch.cat(shown)
    shelf.clear()
    return found
