"""Looking at a tokenizer on pictures: the metrics, and originals beside reconstructions."""

from collections.abc import Iterable, Mapping

import torch
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.pipelines.common import chosen
from vqf.pipelines.engine import Engine
from vqf.pipelines.loop import Evaluation
from vqf.protocols import Batch, Metric, Reconstruction, Split
from vqf.registry import build
from vqf.tokenizer import Tokenizer

SHOWN = 24  # pairs of pictures in a grid


def build_metrics(config: DictConfig, vocab_size: int, engine: Engine) -> dict[str, Metric]:
    """Build the metrics of a config, each starting from nothing."""
    return {
        name: build("metric", node, vocab_size=vocab_size, device=engine.device)
        for name, node in chosen(config, "metric").items()
    }


def reconstruct(tokenizer: Tokenizer, batch: Batch, engine: Engine) -> Reconstruction:
    """Send pictures through the codes and back."""
    assert batch.images is not None
    with torch.no_grad(), engine.autocast():
        indices = tokenizer.encode(batch.images)
        pictures = tokenizer.decode(indices).float()
    return Reconstruction(batch.images, pictures, indices, batch.masks)


def evaluate(
    tokenizer: Tokenizer, batches: Iterable[Batch], count: int, metrics: Mapping[str, Metric], engine: Engine
) -> dict[str, float]:
    """Reconstruct `count` pictures and compute every metric over them."""
    tokenizer.eval()
    with terminal.progress("evaluate", count) as bar:
        for batch in batches:
            reconstruction = reconstruct(tokenizer, batch.to(engine.device), engine)
            for metric in metrics.values():
                metric.update(reconstruction)
            bar.advance(len(batch))
    return {key: value for metric in metrics.values() for key, value in metric.compute().items()}


def side_by_side(tokenizer: Tokenizer, split: Split, engine: Engine, count: int = SHOWN) -> Tensor:
    """Return originals and reconstructions in turn (2 * count, 3, H, W), spread evenly over a split."""
    count = min(count, len(split))
    samples = [split.item(0, i * len(split) // count) for i in range(count)]
    shown = reconstruct(tokenizer, Batch.collate(samples).to(engine.device), engine)
    return rearrange([shown.images, shown.reconstructions], "two b c h w -> (b two) c h w")


def report(
    tokenizer: Tokenizer, split: Split, batches: Iterable[Batch], count: int, config: DictConfig, engine: Engine
) -> Evaluation:
    """Evaluate the metrics of a config on pictures of a split, and show some of them."""
    metrics = build_metrics(config, tokenizer.vocab_size, engine)
    scalars = evaluate(tokenizer, batches, count, metrics, engine)
    return Evaluation(scalars, {"reconstructions": side_by_side(tokenizer, split, engine)})
