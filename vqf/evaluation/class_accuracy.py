"""How often a sample is of the class that it was asked for, by a small classifier on frozen features.

The classifier is a ridge regression on EfficientNet-Lite0 features, in closed form: no step size, no random start, the
same numbers every time. It learns every training picture twice, as it is and as the tokenizer draws it, so that blur
alone does not look like another class. The idea is that of Classification Accuracy Score, https://arxiv.org/abs/1905.10887,
turned round: there a network learns from samples and is tested on pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from vqf import terminal
from vqf.batch import Batch
from vqf.dataloading.loader import keyed
from vqf.dataloading.order import in_batches
from vqf.dataloading.token_shards import Tokens
from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.models.generator import Generator
from vqf.networks.perceptual import lite
from vqf.protocols import Data

TAPS = (3, 5, 7, 8)  # the last layers of four widths: 40 + 112 + 320 + 1280 numbers a picture
LARGEST = 128  # pixels that the network looks at; larger pictures are shrunk, and cost no more
MOST = 4096  # training pictures that the classifier learns from, and half as many that test it
PENALTY = 1.0  # on standardised features; a third and three times as much change the result by less than its error


@dataclass(frozen=True)
class Verdict:
    """What the classifier says.

    Shares are means over classes, so that chance is one over their number whatever the classes' sizes.
    """

    samples: float
    real: float  # held-out pictures
    drawn: float  # held-out pictures as the tokenizer draws them: the most that samples can be expected to reach
    chance: float
    confusion: Tensor  # (classes, classes) counts of samples: rows are asked for, columns are what it sees

    def scalars(self) -> dict[str, float]:
        """Return the numbers by name."""
        return {
            "class_accuracy": self.samples,
            "class_accuracy_real": self.real,
            "class_accuracy_drawn": self.drawn,
            "class_accuracy_chance": self.chance,
        }


class Classifier:
    """Ridge regression from features (N, D) to classes, every class with the same weight."""

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        features = features.double()
        self.mean, self.scale = features.mean(0), features.std(0).clamp(min=1e-6)
        inputs = self._inputs(features)
        counts = torch.bincount(labels, minlength=classes).clamp(min=1).double()
        weights = (len(labels) / classes / counts)[labels][:, None]
        penalty = torch.full((inputs.shape[1],), PENALTY * len(labels), dtype=torch.double, device=inputs.device)
        penalty[-1] = 0  # of the constant
        targets = F.one_hot(labels, classes).double() * 2 - 1
        normal = inputs.T @ (weights * inputs) + penalty.diag()
        self.solution = torch.linalg.solve(normal, inputs.T @ (weights * targets))

    def __call__(self, features: Tensor) -> Tensor:
        """Return the class of each (N,)."""
        return (self._inputs(features.double()) @ self.solution).argmax(1)

    def _inputs(self, features: Tensor) -> Tensor:
        return F.pad((features - self.mean) / self.scale, (0, 1), value=1.0)


@dataclass(frozen=True)
class Described:
    """Pictures as the classifier sees them."""

    features: Tensor  # (N, D)
    labels: Tensor  # (N,)

    def and_also(self, other: "Described") -> "Described":
        """Return both, one behind the other."""
        return Described(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))

    def accuracy(self, classifier: Classifier) -> float:
        """Return the share that is seen as what it is, the mean over the classes that occur."""
        right = (classifier(self.features) == self.labels).double()
        return float(torch.stack([right[self.labels == each].mean() for each in self.labels.unique()]).mean())


@dataclass(frozen=True)
class Pair:
    """The same pictures as they are, and as the tokenizer draws them."""

    originals: Described
    drawn: Described


def judge(train: Pair, held_out: Pair, samples: Described, classes: int) -> Verdict:
    """Let a classifier learn from training pictures, and say what it sees in the others."""
    learned = train.originals.and_also(train.drawn)
    classifier = Classifier(learned.features, learned.labels, classes)
    cells = samples.labels * classes + classifier(samples.features)
    return Verdict(
        samples.accuracy(classifier),
        held_out.originals.accuracy(classifier),
        held_out.drawn.accuracy(classifier),
        1 / classes,
        torch.bincount(cells, minlength=classes**2).view(classes, classes),
    )


class Judge:
    """Draws samples of every class and says how many of them look like it.

    Args:
        data: Whose pictures the classifier learns from and is tested on.
        cached: Their tokens, by the part of the data.
        config: Says how many samples (`evaluate.samples`), and the seed.
        engine: Where it happens. Several processes do a part each.
    """

    def __init__(self, data: Data, cached: Mapping[str, Tokens], config: DictConfig, engine: Engine) -> None:
        self.data, self.cached, self.config, self.engine = data, cached, config, engine

    def __call__(self, generator: Generator) -> Verdict | None:
        """Judge a generator; None where nothing is asked for, or its samples are not drawn by labels."""
        told = self.cached["validation"].pick([0], [0]).to(self.engine.device)
        wanted = self.config.evaluate.samples and generator.tokenizer.channels == 3
        if not wanted or not reads_labels(generator, told):
            return None
        describe, classes = Describer(self.engine), len(generator.classes)
        train = self._held(generator, "train", MOST, describe)
        held_out = self._held(generator, "validation", MOST // 2, describe)
        samples = self._samples(generator, describe)
        if train is None or held_out is None or samples is None:
            return comm.same(None)
        return comm.same(judge(train, held_out, samples, classes))

    def _held(self, generator: Generator, part: str, most: int, describe: "Describer") -> Pair | None:
        """Describe pictures of a part of the data in the first process, spread evenly over it; None in the others."""
        split, tokens, config = self.data.split(part), self.cached[part], self.config
        count = min(most, len(split))
        lots = in_batches([i * len(split) // count for i in range(count)], config.batch_size)
        keys = [[(0, index) for index in lot] for lot in lots]
        pictures = keyed(split, keys, workers=config.workers, timeout=config.worker_timeout)
        table = Table()
        with terminal.progress(f"classes, {part}", count) as bar:
            for lot, batch in zip(lots, pictures, strict=True):
                codes = tokens.pick([0] * len(lot), lot).tokens
                assert codes is not None and batch.images is not None and batch.labels is not None
                now = min(len(lot) * comm.world(), bar.left)
                labels = batch.labels.to(self.engine.device)
                table.add(now, describe(batch.images), describe(self._draw(generator, codes)), labels)
                bar.advance(now)
        found = table.columns()
        return None if found is None else Pair(Described(found[0], found[2]), Described(found[1], found[2]))

    def _samples(self, generator: Generator, describe: "Describer") -> Described | None:
        """Draw samples, as many of every class as of any other, and describe them in the first process."""
        told, table = self._told(len(generator.classes)), Table()
        with terminal.progress("classes, samples", len(told)) as bar:
            for lot in in_batches(range(len(told)), self.config.batch_size):
                some = _rows(told, lot).to(self.engine.device)
                with self.engine.autocast():
                    tokens = generator.sample_tokens(some, seed=self.config.seed, first=lot[0])
                assert some.labels is not None
                now = min(len(lot) * comm.world(), bar.left)
                table.add(now, describe(self._draw(generator, tokens)), some.labels)
                bar.advance(now)
        found = table.columns()
        return None if found is None else Described(*found)

    def _told(self, classes: int) -> Batch:
        """Return what the samples are told: every class equally often, or held-out conditions with their classes."""
        held_out, wanted = self.cached["validation"], self.config.evaluate.samples
        if held_out.codes:
            count = min(wanted, len(held_out))
            return held_out.pick([0] * count, [i * len(held_out) // count for i in range(count)])
        return Batch(labels=equally_often(wanted, classes))

    def _draw(self, generator: Generator, tokens: Tensor) -> Tensor:
        with torch.no_grad(), self.engine.autocast():
            return generator.tokenizer.images(tokens.to(self.engine.device)).float()


def equally_often(count: int, classes: int) -> Tensor:
    """Return about `count` labels: all classes in turn, as often as goes, or else some of them, spread evenly."""
    if count < classes:
        return torch.arange(count) * classes // count
    return torch.arange(count // classes * classes) % classes


def reads_labels(generator: Generator, told: Batch) -> bool:
    """Say whether another class would put other tokens in front of the codes of a batch."""
    if told.labels is None or len(generator.classes) < 2:
        return False
    other = replace(told, labels=(told.labels + 1) % len(generator.classes))
    return not torch.equal(generator.conditioner(told), generator.conditioner(other))


def _rows(batch: Batch, which: Sequence[int]) -> Batch:
    return batch.map(lambda value: value[list(which)])


class Table:
    """Rows that all processes make, in the first of them, on the CPU."""

    def __init__(self) -> None:
        self.pieces: list[list[Tensor]] = []

    def add(self, count: int, *columns: Tensor) -> None:
        """Add `count` rows, of which every process has a part."""
        whole = [comm.collect(each, count) for each in columns]
        self.pieces.append([each.cpu() for each in whole if each is not None])

    def columns(self) -> list[Tensor] | None:
        """Return the columns; None in every process but the first."""
        return [torch.cat(each) for each in zip(*self.pieces, strict=True)] if comm.first() else None


class Describer:
    """Pictures (B, 3, H, W) to features (B, D): the means of a few layers over the picture."""

    def __init__(self, engine: Engine) -> None:
        self.network, self.device = lite("lite0", TAPS).to(engine.device), engine.device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Describe pictures; what lies outside [-1, 1] is clamped."""
        images = images.to(self.device).float()
        if (larger := max(images.shape[2:])) > LARGEST:
            size = [max(round(side * LARGEST / larger), 1) for side in images.shape[2:]]
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        return torch.cat([each.mean((2, 3)) for each in self.network(images.clamp(-1, 1))], dim=1)
