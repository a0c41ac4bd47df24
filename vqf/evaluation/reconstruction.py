"""Looking at a tokenizer on images: the metrics, and originals beside reconstructions."""

from collections.abc import Iterable, Mapping

import torch
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.batch import Batch
from vqf.config.access import group_nodes
from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.evaluation.image_panels import ImagePanels
from vqf.evaluation.validation import ValidationResult
from vqf.images import to_rgb
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import Metric, Reconstruction, Split
from vqf.registry import build, find_component

MAX_PREVIEW_PAIRS = 24  # pairs of images in a grid
PRIOR_METRIC_DIRECTIONS = {"nats_per_token": False}  # whether higher is better


def build_metrics(config: DictConfig, vocab_size: int, engine: Engine) -> dict[str, Metric]:
    """Build the metrics of a config, each starting from nothing."""
    return {
        name: build("metric", node, vocab_size=vocab_size, device=engine.device)
        for name, node in group_nodes(config, "metric").items()
    }


def metric_directions(config: DictConfig) -> dict[str, bool]:
    """Return of the numbers of a config's metrics whether more is better, where a metric says so."""
    targets = [find_component("metric", node.name).target for node in group_nodes(config, "metric").values()]
    return {key: sense for each in targets for key, sense in getattr(each, "higher_is_better", {}).items()}


def reconstruct(tokenizer: Tokenizer, batch: Batch, engine: Engine) -> Reconstruction:
    """Send images through the codes and back."""
    assert batch.images is not None
    with torch.no_grad(), engine.autocast():
        indices = tokenizer.encode(batch.images)
        images = tokenizer.decode(indices).float()
    # Metrics look at images: those of maps of classes are their colours.
    return Reconstruction(to_rgb(batch.images), to_rgb(images), indices, batch.masks)


def evaluate(
    tokenizer: Tokenizer, batches: Iterable[Batch], count: int, metrics: Mapping[str, Metric], engine: Engine
) -> dict[str, float]:
    """Reconstruct `count` images and compute every metric over them.

    Several processes reconstruct a part of every batch each, and the first one computes the metrics of all of it, so
    that a metric need not know of them; then all are told.
    """
    tokenizer.eval()
    with terminal.progress("evaluate", count) as bar:
        for batch in batches:
            now = min(len(batch) * comm.world_size(), bar.remaining)
            whole = gather_to_main(reconstruct(tokenizer, batch.to(engine.device), engine), now)
            if whole is not None:
                for metric in metrics.values():
                    metric.update(whole)
            bar.advance(now)
    if not comm.is_main():
        return comm.broadcast_object({})
    return comm.broadcast_object({key: value for metric in metrics.values() for key, value in metric.compute().items()})


def gather_to_main(local: Reconstruction, count: int) -> Reconstruction | None:
    """Return the reconstructions of all processes in the first one, None in the others."""
    fields = {name: None if each is None else comm.gather_rows(each, count) for name, each in vars(local).items()}
    return Reconstruction(**fields) if comm.is_main() else None  # type: ignore[arg-type]


def side_by_side(tokenizer: Tokenizer, split: Split, engine: Engine, count: int = MAX_PREVIEW_PAIRS) -> Tensor:
    """Return originals and reconstructions in turn (2 * count, 3, H, W), spread evenly over a split."""
    count = min(count, len(split))
    samples = [split.item(0, i * len(split) // count) for i in range(count)]
    shown = reconstruct(tokenizer, Batch.collate(samples).to(engine.device), engine)
    pairs = [to_rgb(shown.images), to_rgb(shown.reconstructions)]
    return rearrange(pairs, "two b c h w -> (b two) c h w")


def evaluate_and_preview(
    tokenizer: Tokenizer, split: Split, batches: Iterable[Batch], count: int, config: DictConfig, engine: Engine
) -> ValidationResult:
    """Evaluate the metrics of a config on images of a split, and show some of them."""
    metrics, album = (
        build_metrics(config, tokenizer.vocab_size, engine),
        ImagePanels(tokenizer.vocab_size, engine.device),
    )
    scalars = evaluate(tokenizer, batches, count, {**metrics, "album": album}, engine)
    if not comm.is_main():
        return ValidationResult(scalars)
    pairs = side_by_side(tokenizer, split, engine)
    return ValidationResult(scalars, {"reconstructions": pairs, **album.images()}, album.details())
