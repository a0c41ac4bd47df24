"""Class accuracy of samples: how often a classifier predicts the class that was asked for.

The classifier is fitted to every training image and its reconstruction; otherwise the blur of a tokenizer would shift
predictions. Related to the Classification Accuracy Score (https://arxiv.org/abs/1905.10887).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.batch import Batch
from vqf.dataloading.loader import keyed_batches
from vqf.dataloading.order import batches_for_rank
from vqf.dataloading.token_shards import TokenDataset
from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.distributed.threads import cpu_threads
from vqf.models.generator import Generator
from vqf.networks.perceptual import efficientnet_lite
from vqf.protocols import Data

TAPS = (3, 5, 7, 8)  # the last layers of four widths: 40 + 112 + 320 + 1280 features
MAX_IMAGE_SIDE = 128  # pixels; larger images are scaled down
MAX_TRAIN_IMAGES = 4096  # half as many validation images
RIDGE_PENALTY = 1.0  # on standardized features; a factor of 3 either way changes results by less than their error


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracies, each the mean over classes."""

    samples: float
    real: float  # validation images
    decoded: float  # reconstructions of validation images: an upper bound for samples
    chance: float
    confusion: Tensor  # (classes, classes) counts of samples: row: class asked for, column: prediction

    def scalars(self) -> dict[str, float]:
        return {
            "class_accuracy": self.samples,
            "class_accuracy_real": self.real,
            "class_accuracy_decoded": self.decoded,
            "class_accuracy_chance": self.chance,
        }


class RidgeClassifier:
    """Ridge regression from features (N, D) to labels (N,) with equally weighted classes."""

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        features = features.double()
        self.mean, self.scale = features.mean(0), features.std(0).clamp(min=1e-6)
        inputs = self._inputs(features)
        counts = torch.bincount(labels, minlength=classes).clamp(min=1).double()
        weights = (len(labels) / classes / counts)[labels][:, None]
        penalty = torch.full((inputs.shape[1],), RIDGE_PENALTY * len(labels), dtype=torch.double, device=inputs.device)
        penalty[-1] = 0  # the bias
        targets = F.one_hot(labels, classes).double() * 2 - 1
        normal = inputs.T @ (weights * inputs) + penalty.diag()
        self.weights = torch.linalg.solve(normal, inputs.T @ (weights * targets))

    def __call__(self, features: Tensor) -> Tensor:
        return (self._inputs(features.double()) @ self.weights).argmax(1)

    def _inputs(self, features: Tensor) -> Tensor:
        return F.pad((features - self.mean) / self.scale, (0, 1), value=1.0)


@dataclass(frozen=True)
class LabeledFeatures:
    """Features of images, with their labels."""

    features: Tensor  # (N, D)
    labels: Tensor  # (N,)

    def concat(self, other: "LabeledFeatures") -> "LabeledFeatures":
        return LabeledFeatures(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))

    def accuracy(self, classifier: RidgeClassifier) -> float:
        """Return the mean over the classes that have images."""
        correct = (classifier(self.features) == self.labels).double()
        return float(torch.stack([correct[self.labels == label].mean() for label in self.labels.unique()]).mean())


@dataclass(frozen=True)
class OriginalsAndDecoded:
    """Features of images and of their reconstructions."""

    originals: LabeledFeatures
    decoded: LabeledFeatures


def score(
    train: OriginalsAndDecoded, validation: OriginalsAndDecoded, samples: LabeledFeatures, classes: int
) -> ClassAccuracy:
    """Fit a classifier to training images, and apply it to the others."""
    fitted = train.originals.concat(train.decoded)
    classifier = RidgeClassifier(fitted.features, fitted.labels, classes)
    cells = samples.labels * classes + classifier(samples.features)
    return ClassAccuracy(
        samples.accuracy(classifier),
        validation.originals.accuracy(classifier),
        validation.decoded.accuracy(classifier),
        1 / classes,
        torch.bincount(cells, minlength=classes**2).view(classes, classes),
    )


class ClassAccuracyEvaluator:
    """Measures how many samples are classified as their class."""

    def __init__(
        self, data: Data, token_datasets: Mapping[str, TokenDataset], config: DictConfig, engine: Engine
    ) -> None:
        self.data, self.token_datasets, self.config, self.engine = data, token_datasets, config, engine

    def __call__(self, generator: Generator) -> ClassAccuracy | None:
        """Score a generator; None without samples, RGB or classes."""
        batch = self.token_datasets["validation"].gather([0], [0]).to(self.engine.device)
        possible = self.config.evaluate.samples and generator.tokenizer.channels == 3
        if not possible or not is_class_conditional(generator, batch):
            return None
        extractor, classes = FeatureExtractor(self.engine), len(generator.classes)
        train = self._extract_split(generator, "train", MAX_TRAIN_IMAGES, extractor)
        validation = self._extract_split(generator, "validation", MAX_TRAIN_IMAGES // 2, extractor)
        samples = self._extract_samples(generator, extractor)
        if train is None or validation is None or samples is None:  # not the main process
            return comm.broadcast_object(None)
        return comm.broadcast_object(score(train, validation, samples, classes))

    def _extract_split(
        self, generator: Generator, split_name: str, max_images: int, extractor: "FeatureExtractor"
    ) -> OriginalsAndDecoded | None:
        split, tokens, config = self.data.split(split_name), self.token_datasets[split_name], self.config
        count = min(max_images, len(split))
        index_batches = batches_for_rank([i * len(split) // count for i in range(count)], config.batch_size)
        keys = [[(0, index) for index in indices] for indices in index_batches]
        images = keyed_batches(split, keys, workers=config.workers, timeout=config.worker_timeout)
        table = GatheredColumns()
        with terminal.progress(f"classes, {split_name}", count) as bar:
            for indices, batch in zip(index_batches, images, strict=True):
                codes = tokens.gather([0] * len(indices), indices).tokens
                assert codes is not None and batch.images is not None and batch.labels is not None
                total = min(len(indices) * comm.world_size(), bar.remaining)
                labels = batch.labels.to(self.engine.device)
                table.add(total, extractor(batch.images), extractor(self._decode(generator, codes)), labels)
                bar.advance(total)
        columns = table.columns()
        if columns is None:
            return None
        originals, decoded, labels = columns
        return OriginalsAndDecoded(LabeledFeatures(originals, labels), LabeledFeatures(decoded, labels))

    def _extract_samples(self, generator: Generator, extractor: "FeatureExtractor") -> LabeledFeatures | None:
        conditions, table = self._sample_conditions(len(generator.classes)), GatheredColumns()
        with terminal.progress("classes, samples", len(conditions)) as bar:
            for indices in batches_for_rank(range(len(conditions)), self.config.batch_size):
                batch = _select(conditions, indices).to(self.engine.device)
                with self.engine.autocast():
                    tokens = generator.sample_tokens(batch, seed=self.config.seed, first=indices[0])
                assert batch.labels is not None
                total = min(len(indices) * comm.world_size(), bar.remaining)
                table.add(total, extractor(self._decode(generator, tokens)), batch.labels)
                bar.advance(total)
        columns = table.columns()
        return None if columns is None else LabeledFeatures(*columns)

    def _sample_conditions(self, classes: int) -> Batch:
        validation, count = self.token_datasets["validation"], self.config.evaluate.samples
        if validation.condition_names:
            count = min(count, len(validation))
            return validation.gather([0] * count, [i * len(validation) // count for i in range(count)])
        return Batch(labels=balanced_labels(count, classes))

    def _decode(self, generator: Generator, tokens: Tensor) -> Tensor:
        with torch.no_grad(), self.engine.autocast():
            return generator.tokenizer.decode_tokens(tokens.to(self.engine.device)).float()


def balanced_labels(count: int, classes: int) -> Tensor:
    """Return `count` labels, rounded down to a multiple of `classes`; fewer are spread evenly."""
    if count < classes:
        return torch.arange(count) * classes // count
    return torch.arange(count // classes * classes) % classes


def is_class_conditional(generator: Generator, batch: Batch) -> bool:
    """Tell whether a prefix depends on labels."""
    if batch.labels is None or len(generator.classes) < 2:
        return False
    other = replace(batch, labels=(batch.labels + 1) % len(generator.classes))
    return not generator.conditioner(batch).equals(generator.conditioner(other))


def _select(batch: Batch, indices: Sequence[int]) -> Batch:
    return batch.map(lambda value: value[list(indices)])


class GatheredColumns:
    """Columns of a table, gathered in the main process."""

    def __init__(self) -> None:
        self.chunks: list[list[Tensor]] = []

    def add(self, count: int, *columns: Tensor) -> None:
        """Add `count` rows in all; every process passes its share."""
        gathered = [comm.gather_rows(column, count) for column in columns]
        self.chunks.append([column.cpu() for column in gathered if column is not None])

    def columns(self) -> list[Tensor] | None:
        return [torch.cat(chunks) for chunks in zip(*self.chunks, strict=True)] if comm.is_main() else None


class FeatureExtractor:
    """Maps images (B, 3, H, W) in [-1, 1] to features (B, 1752), spatial means."""

    def __init__(self, engine: Engine) -> None:
        self.network, self.device = efficientnet_lite("lite0", TAPS).to(engine.device), engine.device

    @cpu_threads.watch("features")
    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device).float()
        if (longer := max(images.shape[2:])) > MAX_IMAGE_SIDE:
            size = [max(round(side * MAX_IMAGE_SIDE / longer), 1) for side in images.shape[2:]]
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        return torch.cat([features.mean((2, 3)) for features in self.network(images.clamp(-1, 1))], dim=1)
