"""Metrics and evaluation protocols."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass
class Reconstruction:
    """The input of a metric."""

    images: Tensor  # (B, 3, H, W)
    reconstructions: Tensor  # (B, 3, H, W), clamped to [-1, 1]
    tokens: Tensor  # (B, T)
    masks: Tensor | None = None  # (B, 1, H, W)


class Metric(Protocol):
    """Numbers over validation images. Wired: layout, the `TokenLayout` of an image; device."""

    def update(self, batch: Reconstruction) -> None: ...

    def compute(self) -> dict[str, float]: ...


@runtime_checkable
class HasIntervals(Protocol):
    """A metric with confidence intervals."""

    def intervals(self) -> dict[str, tuple[float, float]]: ...  # 95 %, of some numbers, by name


@runtime_checkable
class TokenMetric(Protocol):
    """A metric that reads tokens alone, and so measures samples of a prior too."""

    tokens_only: bool  # True


@runtime_checkable
class Directed(Protocol):
    """A metric that can choose a checkpoint; a member of the class."""

    higher_is_better: Mapping[str, bool]  # by name of a number


@runtime_checkable
class HasNetwork(Protocol):
    """A metric of a network's features."""

    digest: str  # of the network's weights


@dataclass
class FeatureSet:
    """Features of a set of images, on the CPU."""

    count: int | None  # images behind mean and covariance; None where a file does not state it
    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64, divided by count - 1
    features: Tensor  # (n, D) float32 of n evenly spread images, for metrics of single images
    logits: Tensor | None = None  # (n, C) float32 of the same images, where the network is a classifier


@dataclass
class SetMetricResult:
    """The numbers of a set metric."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %, of some of the values
    settings: dict[str, Any] = field(default_factory=dict)  # resolved values of options that depend on the sets


class FeatureNetwork(Protocol):
    """A frozen network from images to feature vectors."""

    name: str
    digest: str  # of its weights, and of how it resizes images

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...  # -> (B, D), logits (B, C) of a classifier


@runtime_checkable
class SetMetric(Protocol):
    """A metric of features between generated and real images, or, as a `Metric`, reconstructions. Wired: device."""

    network: FeatureNetwork
    reconstruction_prefix: str  # of its names for reconstructions: "r", as in rFID

    def update(self, batch: Reconstruction) -> None: ...

    def compute(self) -> dict[str, float]: ...

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult: ...


class EvaluationProtocol(Protocol):
    """What is measured on which images: a frozen dataclass, whose fields go into the result."""

    task: str  # "reconstruction" or "generation"
    part: str  # the split that is reconstructed, or whose images are the reference
    count: int | None  # images to reconstruct or generate; None: all, or as many as the reference has
    crop: str
    resize: str
    rounding: str
    reference: str  # "originals", a split, or a file
    seed: int
