"""How often a sample is of the class that it was asked for, by a small classifier on frozen features.

The classifier is a ridge regression on EfficientNet-Lite0 features, in closed form: no step size, no random start, the
same numbers every time. It learns every training image twice, as it is and as the tokenizer draws it, so that blur
alone does not look like another class. The idea is that of Classification Accuracy Score, https://arxiv.org/abs/1905.10887,
turned round: there a network learns from samples and is tested on images.
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
from vqf.models.generator import Generator
from vqf.networks.perceptual import efficientnet_lite
from vqf.protocols import Data

TAPS = (3, 5, 7, 8)  # the last layers of four widths: 40 + 112 + 320 + 1280 numbers an image
MAX_IMAGE_SIDE = 128  # pixels that the network looks at; larger images are shrunk, and cost no more
MAX_TRAIN_IMAGES = 4096  # training images that the classifier learns from, and half as many that test it
RIDGE_PENALTY = (
    1.0  # on standardised features; a third and three times as much change the result by less than its error
)


@dataclass(frozen=True)
class ClassAccuracy:
    """What the classifier says.

    Shares are means over classes, so that chance is one over their number whatever the classes' sizes.
    """

    samples: float
    real: float  # held-out images
    decoded: float  # held-out images as the tokenizer draws them: the most that samples can be expected to reach
    chance: float
    confusion: Tensor  # (classes, classes) counts of samples: rows are asked for, columns are what it sees

    def scalars(self) -> dict[str, float]:
        """Return the numbers by name."""
        return {
            "class_accuracy": self.samples,
            "class_accuracy_real": self.real,
            "class_accuracy_decoded": self.decoded,
            "class_accuracy_chance": self.chance,
        }


class RidgeClassifier:
    """Ridge regression from features (N, D) to classes, every class with the same weight."""

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        features = features.double()
        self.mean, self.scale = features.mean(0), features.std(0).clamp(min=1e-6)
        inputs = self._inputs(features)
        counts = torch.bincount(labels, minlength=classes).clamp(min=1).double()
        weights = (len(labels) / classes / counts)[labels][:, None]
        penalty = torch.full((inputs.shape[1],), RIDGE_PENALTY * len(labels), dtype=torch.double, device=inputs.device)
        penalty[-1] = 0  # of the constant
        targets = F.one_hot(labels, classes).double() * 2 - 1
        normal = inputs.T @ (weights * inputs) + penalty.diag()
        self.weights = torch.linalg.solve(normal, inputs.T @ (weights * targets))

    def __call__(self, features: Tensor) -> Tensor:
        """Return the class of each (N,)."""
        return (self._inputs(features.double()) @ self.weights).argmax(1)

    def _inputs(self, features: Tensor) -> Tensor:
        return F.pad((features - self.mean) / self.scale, (0, 1), value=1.0)


@dataclass(frozen=True)
class LabelledFeatures:
    """Images as the classifier sees them."""

    features: Tensor  # (N, D)
    labels: Tensor  # (N,)

    def concat(self, other: "LabelledFeatures") -> "LabelledFeatures":
        """Return both, one behind the other."""
        return LabelledFeatures(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))

    def accuracy(self, classifier: RidgeClassifier) -> float:
        """Return the share that is seen as what it is, the mean over the classes that occur."""
        right = (classifier(self.features) == self.labels).double()
        return float(torch.stack([right[self.labels == each].mean() for each in self.labels.unique()]).mean())


@dataclass(frozen=True)
class OriginalsAndDecoded:
    """The same images as they are, and as the tokenizer draws them."""

    originals: LabelledFeatures
    decoded: LabelledFeatures


def score(
    train: OriginalsAndDecoded, validation: OriginalsAndDecoded, samples: LabelledFeatures, classes: int
) -> ClassAccuracy:
    """Let a classifier learn from training images, and say what it sees in the others."""
    learned = train.originals.concat(train.decoded)
    classifier = RidgeClassifier(learned.features, learned.labels, classes)
    cells = samples.labels * classes + classifier(samples.features)
    return ClassAccuracy(
        samples.accuracy(classifier),
        validation.originals.accuracy(classifier),
        validation.decoded.accuracy(classifier),
        1 / classes,
        torch.bincount(cells, minlength=classes**2).view(classes, classes),
    )


class ClassAccuracyEvaluator:
    """Draws samples of every class and says how many of them look like it.

    Args:
        data: Whose images the classifier learns from and is tested on.
        token_datasets: Their tokens, by the part of the data.
        config: Says how many samples (`evaluate.samples`), and the seed.
        engine: Where it happens. Several processes do a part each.
    """

    def __init__(
        self, data: Data, token_datasets: Mapping[str, TokenDataset], config: DictConfig, engine: Engine
    ) -> None:
        self.data, self.token_datasets, self.config, self.engine = data, token_datasets, config, engine

    def __call__(self, generator: Generator) -> ClassAccuracy | None:
        """Judge a generator; None where nothing is asked for, or its samples are not drawn by labels."""
        told = self.token_datasets["validation"].gather([0], [0]).to(self.engine.device)
        wanted = self.config.evaluate.samples and generator.tokenizer.channels == 3
        if not wanted or not is_class_conditional(generator, told):
            return None
        describe, classes = FeatureExtractor(self.engine), len(generator.classes)
        train = self._extract_split(generator, "train", MAX_TRAIN_IMAGES, describe)
        held_out = self._extract_split(generator, "validation", MAX_TRAIN_IMAGES // 2, describe)
        samples = self._extract_samples(generator, describe)
        if train is None or held_out is None or samples is None:
            return comm.broadcast_object(None)
        return comm.broadcast_object(score(train, held_out, samples, classes))

    def _extract_split(
        self, generator: Generator, split_name: str, max_images: int, extractor: "FeatureExtractor"
    ) -> OriginalsAndDecoded | None:
        """Describe images of a part of the data in the first process, spread evenly over it; None in the others."""
        split, tokens, config = self.data.split(split_name), self.token_datasets[split_name], self.config
        count = min(max_images, len(split))
        lots = batches_for_rank([i * len(split) // count for i in range(count)], config.batch_size)
        keys = [[(0, index) for index in lot] for lot in lots]
        images = keyed_batches(split, keys, workers=config.workers, timeout=config.worker_timeout)
        table = GatheredColumns()
        with terminal.progress(f"classes, {split_name}", count) as bar:
            for lot, batch in zip(lots, images, strict=True):
                codes = tokens.gather([0] * len(lot), lot).tokens
                assert codes is not None and batch.images is not None and batch.labels is not None
                now = min(len(lot) * comm.world_size(), bar.remaining)
                labels = batch.labels.to(self.engine.device)
                table.add(now, extractor(batch.images), extractor(self._decode(generator, codes)), labels)
                bar.advance(now)
        found = table.columns()
        return (
            None
            if found is None
            else OriginalsAndDecoded(LabelledFeatures(found[0], found[2]), LabelledFeatures(found[1], found[2]))
        )

    def _extract_samples(self, generator: Generator, extractor: "FeatureExtractor") -> LabelledFeatures | None:
        """Draw samples, as many of every class as of any other, and describe them in the first process."""
        told, table = self._sample_conditions(len(generator.classes)), GatheredColumns()
        with terminal.progress("classes, samples", len(told)) as bar:
            for lot in batches_for_rank(range(len(told)), self.config.batch_size):
                some = _select(told, lot).to(self.engine.device)
                with self.engine.autocast():
                    tokens = generator.sample_tokens(some, seed=self.config.seed, first=lot[0])
                assert some.labels is not None
                now = min(len(lot) * comm.world_size(), bar.remaining)
                table.add(now, extractor(self._decode(generator, tokens)), some.labels)
                bar.advance(now)
        found = table.columns()
        return None if found is None else LabelledFeatures(*found)

    def _sample_conditions(self, classes: int) -> Batch:
        """Return what the samples are told: every class equally often, or held-out conditions with their classes."""
        held_out, wanted = self.token_datasets["validation"], self.config.evaluate.samples
        if held_out.condition_names:
            count = min(wanted, len(held_out))
            return held_out.gather([0] * count, [i * len(held_out) // count for i in range(count)])
        return Batch(labels=balanced_labels(wanted, classes))

    def _decode(self, generator: Generator, tokens: Tensor) -> Tensor:
        with torch.no_grad(), self.engine.autocast():
            return generator.tokenizer.decode_tokens(tokens.to(self.engine.device)).float()


def balanced_labels(count: int, classes: int) -> Tensor:
    """Return about `count` labels: all classes in turn, as often as goes, or else some of them, spread evenly."""
    if count < classes:
        return torch.arange(count) * classes // count
    return torch.arange(count // classes * classes) % classes


def is_class_conditional(generator: Generator, batch: Batch) -> bool:
    """Say whether another class would put other tokens in front of the codes of a batch."""
    if batch.labels is None or len(generator.classes) < 2:
        return False
    other = replace(batch, labels=(batch.labels + 1) % len(generator.classes))
    return not torch.equal(generator.conditioner(batch), generator.conditioner(other))


def _select(batch: Batch, indices: Sequence[int]) -> Batch:
    return batch.map(lambda value: value[list(indices)])


class GatheredColumns:
    """Rows that all processes make, in the first of them, on the CPU."""

    def __init__(self) -> None:
        self.chunks: list[list[Tensor]] = []

    def add(self, count: int, *columns: Tensor) -> None:
        """Add `count` rows, of which every process has a part."""
        whole = [comm.gather_rows(each, count) for each in columns]
        self.chunks.append([each.cpu() for each in whole if each is not None])

    def columns(self) -> list[Tensor] | None:
        """Return the columns; None in every process but the first."""
        return [torch.cat(each) for each in zip(*self.chunks, strict=True)] if comm.is_main() else None


class FeatureExtractor:
    """Images (B, 3, H, W) to features (B, D): the means of a few layers over the image."""

    def __init__(self, engine: Engine) -> None:
        self.network, self.device = efficientnet_lite("lite0", TAPS).to(engine.device), engine.device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Describe images; what lies outside [-1, 1] is clamped."""
        images = images.to(self.device).float()
        if (larger := max(images.shape[2:])) > MAX_IMAGE_SIDE:
            size = [max(round(side * MAX_IMAGE_SIDE / larger), 1) for side in images.shape[2:]]
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        return torch.cat([each.mean((2, 3)) for each in self.network(images.clamp(-1, 1))], dim=1)
