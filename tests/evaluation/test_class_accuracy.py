"""Class accuracy of planted generators, whose accuracy is known."""

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from tests.support.layouts import raster
from tests.support.processes import run_processes
from vqf.batch import Batch, Sample
from vqf.dataloading.token_shards import TokenDataset
from vqf.distributed.engine import Engine
from vqf.evaluation.class_accuracy import (
    ClassAccuracy,
    ClassAccuracyEvaluator,
    RidgeClassifier,
    balanced_labels,
    is_class_conditional,
)
from vqf.models.conditioning import ConditionerStack
from vqf.models.generator import Generator
from vqf.registry import build
from vqf.tokens.prefix import Prefix

ENGINE = Engine(torch.device("cpu"), torch.float32)
CLASSES = ("Food & Drink", "People & Body", "Smileys & Emotion", "Symbols")
HELD_OUT = 8  # images of every class
TRAINED = 24
LAYOUT = raster((1, 1), (TRAINED + HELD_OUT) * len(CLASSES), stride=32)
Draw = Callable[[Tensor, Tensor], Tensor]  # labels (B,), numbers of the samples (B,) -> which held-out images (B,)


class Few:
    """A few emoji of four classes, as many of each."""

    classes = CLASSES

    def split(self, name: str) -> "Images":
        return Images(*few()[name])


class Images:
    fingerprint = "few"

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def item(self, epoch: int, index: int) -> Sample:
        return Sample(self.images[index], label=int(self.labels[index]))


@lru_cache(maxsize=1)
def few() -> Mapping[str, tuple[Tensor, Tensor]]:
    data = build("data", {"name": "emoji"}, image_size=32, seed=0)
    parts = {}
    for name, wanted in (("train", TRAINED), ("validation", HELD_OUT)):
        split = data.split(name)
        of = [[i for i, label in enumerate(split.labels) if data.classes[label] == each][:wanted] for each in CLASSES]
        images = torch.stack([split.item(0, i).image for each in of for i in each])
        parts[name] = images, torch.arange(len(CLASSES)).repeat_interleave(wanted)
    return parts


class Album(nn.Module):
    """A tokenizer that has every image for a code: nothing is lost."""

    channels, layout = 3, LAYOUT

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Parameter(torch.cat([few()[name][0] for name in ("train", "validation")]))

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        return self.images[tokens[:, 0]].detach()


def _tokens(codes: Tensor, labels: Tensor) -> TokenDataset:
    return TokenDataset([{"tokens": codes[:, None].int(), "labels": labels}], len(codes))


def cached() -> dict[str, TokenDataset]:
    count = TRAINED * len(CLASSES)
    codes = {"train": torch.arange(count), "validation": torch.arange(count, count + HELD_OUT * len(CLASSES))}
    return {name: _tokens(each, few()[name][1]) for name, each in codes.items()}


class Prior(nn.Module):
    """A prior that nobody asks."""

    layout = LAYOUT


def planted(draw: Draw, conditioner: str = "label") -> Generator:
    """A generator that gives held-out images for samples."""

    def sampler(prior: object, prefix: Prefix, layout: object, *, seed: int, first: int, **_: object) -> Tensor:
        which = draw(prefix.ids[:, 0], torch.arange(first, first + len(prefix)))
        return which[:, None] + TRAINED * len(CLASSES)

    part = build("conditioner", {"name": conditioner}, num_classes=len(CLASSES), layout=LAYOUT, tokenizer=None)
    return Generator(Album(), ConditionerStack({conditioner: part}), Prior(), sampler, CLASSES)  # type: ignore[arg-type]


def config(samples: int) -> DictConfig:
    loading = {"batch_size": 10, "workers": 0, "worker_timeout": 600.0}
    return OmegaConf.create({"evaluate": {"samples": samples}, "seed": 0, **loading})


def verdict(generator: Generator, samples: int) -> ClassAccuracy | None:
    return ClassAccuracyEvaluator(Few(), cached(), config(samples), ENGINE)(generator)  # type: ignore[arg-type]


def of_the_class(labels: Tensor, numbers: Tensor) -> Tensor:
    return labels * HELD_OUT + numbers // len(CLASSES) % HELD_OUT


@pytest.fixture(scope="module")
def copies() -> ClassAccuracy:
    found = verdict(planted(of_the_class), HELD_OUT * len(CLASSES))
    assert found is not None
    return found


def test_copies_of_real_images_are_as_right_as_real_images(copies: ClassAccuracy) -> None:
    found = copies
    assert found.samples == found.real == found.decoded  # the same images, each once
    assert found.real > 0.6
    assert found.chance == 0.25
    assert found.confusion.sum(1).tolist() == [HELD_OUT] * len(CLASSES)
    right = found.confusion.diagonal().sum() / found.confusion.sum()
    assert float(right) == pytest.approx(found.samples)


def test_samples_of_any_class_are_right_by_chance() -> None:
    """Every class is answered with the same 32 images: whatever is seen in them, a quarter is right."""
    found = verdict(planted(lambda labels, numbers: numbers // len(CLASSES)), HELD_OUT * len(CLASSES) ** 2)
    assert found is not None
    assert found.samples == pytest.approx(found.chance)
    assert found.real > 0.6


def test_samples_of_another_class_are_wrong() -> None:
    found = verdict(planted(lambda labels, numbers: of_the_class((labels + 1) % len(CLASSES), numbers)), 32)
    assert found is not None
    assert found.samples < found.chance / 2
    assert found.confusion.diagonal().sum() < found.confusion.sum() / 8


def test_the_verdict_is_the_same_again_and_has_names(copies: ClassAccuracy) -> None:
    again = verdict(planted(of_the_class), HELD_OUT * len(CLASSES))
    assert again is not None
    assert again.scalars() == copies.scalars()
    assert list(again.scalars()) == [f"class_accuracy{each}" for each in ("", "_real", "_decoded", "_chance")]


def judged() -> ClassAccuracy | None:
    """The verdict on a generator whose images depend on the number of the sample, in batches that leave a rest."""
    return verdict(planted(of_the_class), HELD_OUT * len(CLASSES) - 3)


@pytest.mark.slow
def test_two_processes_see_what_one_sees() -> None:
    alone = judged()
    assert alone is not None
    for found in run_processes(2, judged):
        assert found is not None
        assert found.scalars() == pytest.approx(alone.scalars())
        assert torch.equal(found.confusion, alone.confusion)


def test_only_samples_that_are_asked_for_by_class_are_judged() -> None:
    assert verdict(planted(of_the_class), 0) is None
    told = Batch(labels=torch.zeros(1).long(), tokens=torch.zeros(1, 1).long())
    assert is_class_conditional(planted(of_the_class), told)
    assert not is_class_conditional(planted(of_the_class, "none"), told)
    assert not is_class_conditional(planted(of_the_class), Batch(tokens=torch.zeros(1, 1).long()))


@pytest.mark.parametrize(
    ("count", "classes", "labels"),
    [(9, 4, [0, 1, 2, 3, 0, 1, 2, 3]), (3, 3, [0, 1, 2]), (3, 10, [0, 3, 6])],
)
def test_every_class_is_asked_for_equally_often(count: int, classes: int, labels: list[int]) -> None:
    assert balanced_labels(count, classes).tolist() == labels


def test_the_classifier_solves_its_least_squares() -> None:
    """The same problem, stacked: a row for every image and one for every penalty."""
    random = np.random.default_rng(0)
    labels = np.array([0] * 40 + [1] * 10 + [2] * 5)
    features = random.normal(size=(55, 6)) * [1, 5, 0.1, 1, 1, 1] + labels[:, None] * 0.7
    classifier = RidgeClassifier(torch.tensor(features).float(), torch.tensor(labels), 3)
    x = features.astype(np.float32).astype(np.float64)
    x = np.c_[(x - x.mean(0)) / x.std(0, ddof=1), np.ones(55)]
    w = np.sqrt(55 / 3 / np.bincount(labels)[labels])[:, None]
    penalty = np.sqrt(55.0) * np.eye(7)[:6]
    targets = 2.0 * np.eye(3)[labels] - 1
    expected, *_ = np.linalg.lstsq(np.r_[w * x, penalty], np.r_[w * targets, np.zeros((6, 3))], rcond=None)
    np.testing.assert_allclose(classifier.weights.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_rare_classes_count_as_much() -> None:
    labels = torch.tensor([0] * 300 + [1] * 6)
    features = torch.randn(306, 2, generator=torch.Generator().manual_seed(0)) + 1.5 * labels[:, None]
    seen = RidgeClassifier(features, labels, 2)(features)
    assert (seen[labels == 1] == 1).float().mean() > 0.8
