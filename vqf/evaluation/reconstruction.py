"""Evaluates the reconstructions of a tokenizer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.batch import Batch
from vqf.config.access import group_nodes
from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.distributed.threads import cpu_threads
from vqf.evaluation.image_panels import ImagePanels
from vqf.evaluation.validation import ValidationResult
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import Directed, Metric, Reconstruction, Split
from vqf.registry import build, find_component
from vqf.tokens.layout import TokenLayout

MAX_PREVIEW_PAIRS = 24  # in a grid


def build_metrics(config: DictConfig, layout: TokenLayout, engine: Engine) -> dict[str, Metric]:
    """Build the metrics of a config."""
    return {
        name: build("metric", node, layout=layout, device=engine.device)
        for name, node in group_nodes(config, "metric").items()
    }


def metric_directions(config: DictConfig) -> dict[str, bool]:
    """Return whether higher is better, by key."""
    nodes = group_nodes(config, "metric").values()
    metrics: list[Any] = [find_component("metric", node.name).target for node in nodes]
    directed = [metric.higher_is_better for metric in metrics if isinstance(metric, Directed)]
    return {key: higher for directions in directed for key, higher in directions.items()}


@cpu_threads.watch("reconstruct")
def reconstruct(tokenizer: Tokenizer, batch: Batch, engine: Engine) -> Reconstruction:
    """Encode and decode images; class maps become colors."""
    assert batch.images is not None
    with torch.no_grad(), engine.autocast():
        indices = tokenizer.encode(batch.images)
        images = tokenizer.decode(indices).float()
    tokens = tokenizer.layout.flatten(indices)
    return Reconstruction(tokenizer.to_rgb(batch.images), tokenizer.to_rgb(images), tokens, batch.masks)


def evaluate(
    tokenizer: Tokenizer, batches: Iterable[Batch], count: int, metrics: Mapping[str, Metric], engine: Engine
) -> dict[str, float]:
    """Reconstruct `count` images and compute every metric, in every process."""
    tokenizer.eval()
    with terminal.progress("evaluate", count) as bar:
        for batch in batches:
            total = min(len(batch) * comm.world_size(), bar.remaining)
            full_batch = gather_to_main(reconstruct(tokenizer, batch.to(engine.device), engine), total)
            if full_batch is not None:
                for metric in metrics.values():
                    metric.update(full_batch)
            bar.advance(total)
    if not comm.is_main():
        return comm.broadcast_object({})
    return comm.broadcast_object({key: value for metric in metrics.values() for key, value in metric.compute().items()})


def gather_to_main(local: Reconstruction, count: int) -> Reconstruction | None:
    """Gather the first `count` reconstructions; None outside the main process."""
    fields: dict[str, Any] = {
        name: None if rows is None else comm.gather_rows(rows, count) for name, rows in vars(local).items()
    }
    return Reconstruction(**fields) if comm.is_main() else None


def side_by_side(tokenizer: Tokenizer, split: Split, engine: Engine, count: int = MAX_PREVIEW_PAIRS) -> Tensor:
    """Return originals, each before its reconstruction (2 * count, 3, H, W)."""
    count = min(count, len(split))
    samples = [split.item(0, i * len(split) // count) for i in range(count)]
    batch = reconstruct(tokenizer, Batch.collate(samples).to(engine.device), engine)
    return rearrange([batch.images, batch.reconstructions], "two b c h w -> (b two) c h w")


def evaluate_and_preview(
    tokenizer: Tokenizer, split: Split, batches: Iterable[Batch], count: int, config: DictConfig, engine: Engine
) -> ValidationResult:
    """Evaluate `count` images, with previews in the main process."""
    metrics = build_metrics(config, tokenizer.layout, engine)
    panels = ImagePanels(tokenizer.layout, engine.device)
    scalars = evaluate(tokenizer, batches, count, {**metrics, "panels": panels}, engine)
    if not comm.is_main():
        return ValidationResult(scalars)
    pairs = side_by_side(tokenizer, split, engine)
    return ValidationResult(scalars, {"reconstructions": pairs, **panels.images()}, panels.details())
