"""Looking at a tokenizer on pictures: the metrics, and originals beside reconstructions."""

from collections.abc import Iterable, Mapping

import torch
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.batch import Batch
from vqf.config.access import chosen
from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.evaluation.image_panels import Album
from vqf.evaluation.validation import Evaluation
from vqf.images import as_colours
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import Metric, Reconstruction, Split
from vqf.registry import build, find

SHOWN = 24  # pairs of pictures in a grid
NUMBERS_OF_PRIORS = {"nats_per_token": False}  # whether more is better, as `senses` has it of tokenizers


def build_metrics(config: DictConfig, vocab_size: int, engine: Engine) -> dict[str, Metric]:
    """Build the metrics of a config, each starting from nothing."""
    return {
        name: build("metric", node, vocab_size=vocab_size, device=engine.device)
        for name, node in chosen(config, "metric").items()
    }


def senses(config: DictConfig) -> dict[str, bool]:
    """Return of the numbers of a config's metrics whether more is better, where a metric says so."""
    targets = [find("metric", node.name).target for node in chosen(config, "metric").values()]
    return {key: sense for each in targets for key, sense in getattr(each, "higher_is_better", {}).items()}


def reconstruct(tokenizer: Tokenizer, batch: Batch, engine: Engine) -> Reconstruction:
    """Send pictures through the codes and back."""
    assert batch.images is not None
    with torch.no_grad(), engine.autocast():
        indices = tokenizer.encode(batch.images)
        pictures = tokenizer.decode(indices).float()
    # Metrics look at pictures: those of maps of classes are their colours.
    return Reconstruction(as_colours(batch.images), as_colours(pictures), indices, batch.masks)


def evaluate(
    tokenizer: Tokenizer, batches: Iterable[Batch], count: int, metrics: Mapping[str, Metric], engine: Engine
) -> dict[str, float]:
    """Reconstruct `count` pictures and compute every metric over them.

    Several processes reconstruct a part of every batch each, and the first one computes the metrics of all of it, so
    that a metric need not know of them; then all are told.
    """
    tokenizer.eval()
    with terminal.progress("evaluate", count) as bar:
        for batch in batches:
            now = min(len(batch) * comm.world(), bar.left)
            whole = collected(reconstruct(tokenizer, batch.to(engine.device), engine), now)
            if whole is not None:
                for metric in metrics.values():
                    metric.update(whole)
            bar.advance(now)
    if not comm.first():
        return comm.same({})
    return comm.same({key: value for metric in metrics.values() for key, value in metric.compute().items()})


def collected(part: Reconstruction, count: int) -> Reconstruction | None:
    """Return the reconstructions of all processes in the first one, None in the others."""
    fields = {name: None if each is None else comm.collect(each, count) for name, each in vars(part).items()}
    return Reconstruction(**fields) if comm.first() else None  # type: ignore[arg-type]


def side_by_side(tokenizer: Tokenizer, split: Split, engine: Engine, count: int = SHOWN) -> Tensor:
    """Return originals and reconstructions in turn (2 * count, 3, H, W), spread evenly over a split."""
    count = min(count, len(split))
    samples = [split.item(0, i * len(split) // count) for i in range(count)]
    shown = reconstruct(tokenizer, Batch.collate(samples).to(engine.device), engine)
    pairs = [as_colours(shown.images), as_colours(shown.reconstructions)]
    return rearrange(pairs, "two b c h w -> (b two) c h w")


def report(
    tokenizer: Tokenizer, split: Split, batches: Iterable[Batch], count: int, config: DictConfig, engine: Engine
) -> Evaluation:
    """Evaluate the metrics of a config on pictures of a split, and show some of them."""
    metrics, album = build_metrics(config, tokenizer.vocab_size, engine), Album(tokenizer.vocab_size, engine.device)
    scalars = evaluate(tokenizer, batches, count, {**metrics, "album": album}, engine)
    if not comm.first():
        return Evaluation(scalars)
    pairs = side_by_side(tokenizer, split, engine)
    return Evaluation(scalars, {"reconstructions": pairs, **album.images()}, album.details())
