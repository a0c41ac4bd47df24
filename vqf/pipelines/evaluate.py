"""Evaluate a finished run by a named protocol."""

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
from vqf.evaluation.evaluation_images import EvaluationImages, PixelHash
from vqf.evaluation.feature_cache import FeatureStatisticsCache, extract_features
from vqf.evaluation.image_panels import ImagePanels
from vqf.evaluation.likelihood import prior_scalars
from vqf.evaluation.preprocessing import round_to_8bit
from vqf.evaluation.result import EvaluationResult
from vqf.models.generator import Generator
from vqf.pipelines.report import refresh_page
from vqf.protocols import EvaluationProtocol, Reconstruction, SetMetricResult, TokenMetric
from vqf.registry import build, register
from vqf.runs.checkpoint import Checkpoint, all_checkpoints, find_checkpoint, run_dir_of
from vqf.runs.load import find_generator_checkpoint, find_tokenizer_checkpoint, load_generator, load_tokenizer
from vqf.runs.provenance import ResourceMeter
from vqf.runs.run_logger import start_run
from vqf.terminal import log

MAX_SAMPLES = 50_000  # upper limit where the protocol asks for as many samples as the reference has images
MAX_PREVIEW_SAMPLES = 64  # samples in the grid
DEFAULT_PROTOCOLS = {"stage1": "reconstruction", "stage2": "generation"}  # by kind of checkpoint
OFFLINE_METRICS = ["psnr", "ssim", "features", "usage", "fd_lite2", "kd_lite2", "prdc_lite2"]  # need no download
INHERITED_KEYS = ["data", "target", "image_size", "batch_size", "sampler"]


@register("pipeline", "evaluate", defaults=[{"override /metric": OFFLINE_METRICS}])
class Evaluate:
    """Evaluate a run by the chosen protocol: reconstructions of a tokenizer, or samples of a prior.

    Writes `evaluations/<protocol>-<hash>/<stage>-<step>/metrics.json` below the run, and a copy into its own folder.

    Args:
        statistics: Cache folder for the features of real images, and for the samples of an interrupted evaluation;
            by default `vqf/statistics` in the user's cache folder.
        checkpoints: `one`: the newest of the run, or the one that `run=` names; `all`: every checkpoint of the run.
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
        meter = ResourceMeter()
        checkpoints, node = self._open_checkpoints()
        config = inherit(self.config, checkpoints[0].config, INHERITED_KEYS)
        config.protocol = node
        engine = make_engine(config)
        results = [self._evaluate(checkpoint, config, engine) for checkpoint in checkpoints]
        with start_run(config, self.run_dir, meter) as journal:
            for checkpoint, metrics in zip(checkpoints, results, strict=True):
                journal.scalars(checkpoint.step, {f"evaluation/{key}": value for key, value in metrics.values.items()})
            for name, images in results[-1].images.items():
                journal.images(checkpoints[-1].step, name, images)
            journal.write_details(results[-1].details)
        if comm.is_main():
            refresh_page(run_dir_of(checkpoints[-1].path), config)

    def _open_checkpoints(self) -> tuple[list[Checkpoint], DictConfig]:
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
        meter = ResourceMeter()
        protocol: EvaluationProtocol = build("protocol", config.protocol)
        if protocol.task == "reconstruction":
            metrics = self._evaluate_reconstructions(checkpoint, config, protocol, engine)
        else:
            metrics = self._evaluate_samples(checkpoint, config, protocol, engine)
        if comm.is_main():
            environment = result.environment(meter.elapsed_seconds, str(engine.device))
            metrics.print_table()
            run = run_dir_of(Path(config.run).expanduser())
            log.info("%s", result.save(metrics, checkpoint, environment, run, self.run_dir))
        return metrics

    def _evaluate_reconstructions(
        self, checkpoint: Checkpoint, config: DictConfig, protocol: EvaluationProtocol, engine: Engine
    ) -> EvaluationResult:
        if not group_nodes(config, "metric"):
            raise UserError(
                f"metric=[]: nothing to measure; give metric=[{','.join(OFFLINE_METRICS)}], or some of them"
            )
        tokenizer = engine.prepare(load_tokenizer(checkpoint))
        context = EvaluationContext(config, protocol, tokenizer, engine, self.feature_cache)
        context.warn_if_validation_changed(checkpoint)
        return evaluate_reconstructions(context)

    def _evaluate_samples(
        self, checkpoint: Checkpoint, config: DictConfig, protocol: EvaluationProtocol, engine: Engine
    ) -> EvaluationResult:
        generator = load_generator(checkpoint, config.sampler).to(engine.device)
        context = EvaluationContext(config, protocol, generator.tokenizer, engine, self.feature_cache)
        context.warn_if_validation_changed(checkpoint)
        return evaluate_samples(context, generator, result.manifest_sha256(checkpoint))


def evaluate_reconstructions(context: EvaluationContext) -> EvaluationResult:
    """Reconstruct the protocol's images; compare them pairwise and as a set.

    Ranks share each batch; only rank 0 returns metrics.
    """
    protocol, metrics, tokenizer = context.protocol, EvaluationResult(), context.tokenizer
    reference, images = context.reference(), context.images(protocol.part, protocol.count)
    pixel_hash, panels = PixelHash(protocol.rounding), ImagePanels(tokenizer.layout, context.engine.device)

    def reconstructions() -> Iterator[Tensor]:
        for batch, count in images.local_batches("reconstruct"):
            local = reconstruction.reconstruct(tokenizer, batch, context.engine)
            local.reconstructions = round_to_8bit(local.reconstructions, protocol.rounding)
            gathered = reconstruction.gather_to_main(local, count)
            if gathered is not None:
                pixel_hash.update(gathered.images)
                for metric in (panels, *context.batch_metrics.values()):
                    metric.update(gathered)
                yield gathered.reconstructions

    # One pass feeds the set metrics' networks, the pairwise metrics and the hash: nothing is decoded twice.
    generated = extract_features(reconstructions(), context.feature_networks, images.count)
    if reference is None:
        reference = context.feature_cache.from_images(images, pixel_hash.hexdigest(), context.feature_networks)
    if not comm.is_main():
        return metrics
    context.add_metrics(metrics, context.batch_metrics)
    context.add_set_metrics(metrics, reference, generated, images.count)
    metrics.set_protocol(context.result_lines(pixel_hash.hexdigest(), images.count, reference))
    metrics.images["reconstructions"] = reconstruction.side_by_side(tokenizer, images.split, context.engine)
    metrics.images |= panels.images()
    metrics.details = panels.details()
    return metrics


def evaluate_samples(context: EvaluationContext, generator: Generator, checkpoint_sha256: str) -> EvaluationResult:
    """Sample and compare with the reference as a set; measure nats per token on validation images.

    Ranks share each batch; only rank 0 returns metrics.
    """
    protocol: Any = context.protocol
    metrics, reference = EvaluationResult(), context.reference()
    assert reference is not None, "samples have no originals"
    validation_images = context.images(protocol.part)
    count = protocol.count or min(reference.count or MAX_SAMPLES, MAX_SAMPLES)
    token_metrics = _token_metrics(context)
    pixels_hash, loss = generation.validation_loss(generator, validation_images, context.engine)
    sampler_lines = generation.sampler_lines(context.config.sampler, generator.sampler)
    cache = _sample_cache(context, checkpoint_sha256, count, validation_images, sampler_lines)
    preview, labels = list[Tensor](), list[Tensor]()

    def samples() -> Iterator[Tensor]:
        for batch in generation.generate(protocol, generator, validation_images, count, context.engine, cache):
            images = round_to_8bit(batch.images, protocol.rounding)
            for metric in token_metrics.values():
                metric.update(Reconstruction(images, images, batch.tokens.to(images.device)))
            preview.append(images[: max(MAX_PREVIEW_SAMPLES - sum(map(len, preview)), 0)])
            labels.append(batch.labels)
            yield images

    generated = extract_features(samples(), context.feature_networks, count)
    if not comm.is_main():
        return metrics
    name, value = next(iter(prior_scalars(generator.prior, loss).items()))
    metrics.add(None, SetMetricResult({name: value}), {})
    metrics.higher_is_better[name] = False
    context.add_metrics(metrics, token_metrics)
    context.add_set_metrics(metrics, reference, generated, count)
    class_lines = {"samples_per_class": generation.class_counts(torch.cat(labels), len(generator.classes))}
    metrics.set_protocol(context.result_lines(pixels_hash, count, reference) | class_lines | sampler_lines)
    metrics.images["samples"] = torch.cat(preview)
    cache.clear()
    return metrics


def _token_metrics(context: EvaluationContext) -> dict[str, Any]:
    batch_metrics = context.batch_metrics
    token_metrics = {name: each for name, each in batch_metrics.items() if isinstance(each, TokenMetric)}
    for name in batch_metrics.keys() - token_metrics.keys():
        log.info("metric '%s' compares images with their reconstructions: samples have none", name)
    return token_metrics


def _sample_cache(
    context: EvaluationContext,
    checkpoint_sha256: str,
    count: int,
    validation_images: EvaluationImages,
    sampler_lines: dict[str, Any],
) -> generation.SampleCache:
    """Open the cache; its key holds everything that changes a sample, the number of ranks included."""
    batch_size, device = validation_images.batch_size, context.engine.device.type
    key = {"checkpoint": checkpoint_sha256, "count": count, "batch": batch_size, "world": comm.world_size()}
    key |= {"device": device, "images": validation_images.source_hash, **sampler_lines}
    return generation.SampleCache(context.feature_cache.folder / "samples", key | context.protocol_lines())
