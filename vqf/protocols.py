"""The interface of each kind of component. A plugin has the members of a protocol and inherits nothing.

Shapes (B images, C channels, stride = pixels per cell and side):

| value | dtype, shape | range |
| --- | --- | --- |
| images | float (B, 3, H, W); condition maps (B, C, H, W) | [-1, 1] |
| latents | float (B, D, h, w), h = H / stride, w = W / stride | |
| indices | int64 (B, h, w), or (B, h, w, K) for K codebooks | [0, vocab_size) |
| tokens | int64 (B, N), N = h * w: the indices row by row | [0, vocab_size) |
| prefix | int64 (B, M): the tokens of a condition, in a vocabulary of their own | [0, prefix_vocab) |

The pipeline passes *wired* parameters of a constructor by name, if declared; all others are options of the config.
*Optional members* are looked up by name; the stated default holds for a missing one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from vqf.batch import Batch, Sample, Size

# Stage 1: the tokenizer.


@dataclass
class Quantized:
    """A quantizer's output."""

    latents: Tensor  # (B, D, h, w) code vectors; gradients reach the encoder through them
    indices: Tensor  # (B, h, w) int64 in [0, vocab_size)
    loss: Tensor  # () codebook and commitment terms, 0 where there are none
    stats: Mapping[str, Tensor] = field(default_factory=dict)  # detached scalars for the log


class Encoder(Protocol):
    """Images to latents. Wired: in_channels, image_size."""

    dim: int  # channels of the latents
    stride: int  # pixels per latent cell and side

    def __call__(self, images: Tensor) -> Tensor: ...  # (B, 3, H, W) -> (B, dim, h, w)


class Decoder(Protocol):
    """Latents to images: `last_layer(features(latents))`. Wired: dim, out_channels, image_size.

    Optional members, with `features = local_features(global_features)`; without them tiles pass through all layers:

    * `global_features(latents)`, (B, dim, h, w) -> (B, D, h, w): layers in which a cell may depend on all cells.
    * `local_features(cells)`: the other layers, local except for group norms; tiles pass through them.
    """

    stride: int
    last_layer: nn.Module  # a plain convolution or linear layer, where the adaptive weight compares gradients

    def features(self, latents: Tensor) -> Tensor: ...  # the input of `last_layer`

    def __call__(self, latents: Tensor) -> Tensor: ...  # (B, dim, h, w) -> (B, 3, H, W)


class Quantizer(Protocol):
    """Latents to indices and back. In eval mode `lookup(q(z).indices)` equals `q(z).latents`.

    Optional member:

    * `update() -> dict[str, Tensor]` advances state without gradients (an EMA codebook) once after every optimizer step
      that was taken, and returns scalars for the log.
    """

    dim: int  # channels of its latents; the tokenizer projects to and from them
    vocab_size: int

    def __call__(self, latents: Tensor) -> Quantized: ...

    def lookup(self, indices: Tensor) -> Tensor: ...  # (B, h, w) -> (B, dim, h, w)


class Loss(Protocol):
    """A distance between reconstructions and images.

    Optional members, of the class:

    * `channels`: the numbers of image channels that it accepts; any by default.
    * `expects_logits = True`: reconstructions are logits of the classes of a label map.
    """

    weight: float

    def __call__(self, reconstructions: Tensor, images: Tensor) -> Tensor: ...  # -> ()


class Discriminator(Protocol):
    """Images to logits of being real, of any shape led by B. Wired: in_channels."""

    def __call__(self, images: Tensor) -> Tensor: ...


class Adversary(Protocol):
    """The GAN losses of generator and discriminator, their start and weight. Wired: steps."""

    start_step: int  # the first step at which the discriminator learns
    refresh_fakes: bool  # whether the discriminator sees reconstructions of the already updated tokenizer

    def generator_loss(self, fake: Tensor) -> Tensor: ...  # logits -> ()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor: ...  # logits -> ()

    def adaptive_weight(self, rec_grad: Tensor, gan_grad: Tensor) -> Tensor:
        """The generator's weight, from both gradients at the decoder's last layer. -> ()."""
        ...

    def weight_at(self, step: int) -> float:
        """Multiplier in [0, 1] of the generator's loss. At 0 the discriminator is skipped."""
        ...


@dataclass
class DiscriminatorOutput:
    """A regularizer's input."""

    discriminator: nn.Module
    images: Tensor  # (B, 3, H, W)
    real_logits: Tensor  # logits of the images
    fake_logits: Tensor  # logits of their reconstructions
    step: int  # counted from the start of the run


class Regularizer(Protocol):
    """A term of the discriminator's loss. Optional member: `last_value`, a tensor to log at steps that skip it."""

    weight: float

    def __call__(self, output: DiscriminatorOutput) -> Tensor: ...  # -> ()


# Stage 2: prior, conditioners, samplers.


class ImageCodec(Protocol):
    """The part of a tokenizer that a conditioner uses."""

    vocab_size: int
    stride: int
    channels: int  # C of its images

    def encode(self, images: Tensor) -> Tensor: ...  # (B, C, H, W) -> (B, H / stride, W / stride) int64

    def decode(self, indices: Tensor) -> Tensor: ...  # (B, h, w) -> (B, C, h * stride, w * stride)


class Conditioner(Protocol):
    """A condition to the prefix tokens in front of the tokens of an image.

    Wired: num_classes; grid, (h, w) of the image's indices; tokenizer, the `ImageCodec` of the images; open_tokenizer,
    a function from the folder of another run to its `ImageCodec`.

    Optional members:

    * `batch_field`: the field of a batch that holds the condition: `conditions` (default), `images`, `crop_boxes`.
    * `channels`, of an image condition: its C.
    * `size_multiple`, of an image condition: must divide its sides in pixels; 1 by default.
    * `positions`: the `GridPosition` of each of the M tokens, None for a token without one (default).
    * `prepare(batch)`: returns the batch with the indices of condition images in `condition_indices`, which are cached
      with the tokens, and cropped to windows of a larger grid.
    * `prepare_shifted(batch)`: the same for condition cells of p by q image cells. Of its indices (B, p, q, h, w),
      [:, i, j] are those of the condition without its first i rows and j columns of image cells.
    * `null_prefix(batch)`: the prefix (B, M) of no condition, or None if the prior has never seen one (default).
    * `dropout`: share of training samples with `null_prefix`, 0 by default. For several conditioners see
      `vqf.models.conditioning.ConditionerStack`.
    * `render(batch)`: an image (B, C, H, W) of the condition.
    """

    vocab_size: int
    length: int  # M

    def __call__(self, batch: Batch) -> Tensor: ...  # -> (B, M) int64


class Prior(Protocol):
    """A distribution over token sequences.

    Wired: vocab_size; length, h * w; grid, (h, w); prefix_vocab; prefix_length, M; prefix_positions, a `GridPosition`
    or None for each prefix token.
    """

    vocab_size: int

    def __call__(self, tokens: Tensor, prefix: Tensor) -> Tensor: ...  # (B, N), (B, M) -> logits (B, N, V)

    def loss(self, tokens: Tensor, prefix: Tensor) -> Tensor: ...  # -> () nats per token, differentiable


@runtime_checkable
class Autoregressive(Protocol):
    """A prior with a key-value cache for sequences that advance together."""

    def prefill(self, prefix: Tensor) -> tuple[Tensor, Any]: ...  # (B, M) -> logits (B, V) of token 0, cache

    def decode(self, token: Tensor, cache: Any) -> Tensor: ...  # (B,), cache -> logits (B, V) of the next token


@dataclass
class RaggedChunks:
    """Chunks of n sequences [prefix; tokens], concatenated to T positions without padding.

    The cache holds all positions before a chunk; entries of later positions are stale, and masked.

    Example: positions 0 to 2 of the sequence in slot 5, then position 7 of the one in slot 4::

        positions      [0, 1, 2, 7]     max_chunk_length  3
        chunk_indices  [0, 0, 0, 1]     context_length    8
        ends           [2, 3]           slots             [5, 4]
    """

    ids: Tensor  # (T,) int64: a prefix id at positions below M, a token elsewhere
    positions: Tensor  # (T,) int64 in the sequence
    chunk_indices: Tensor  # (T,) int64 in [0, n), not decreasing: the chunk of each position
    ends: Tensor  # (n,) int64: index in T of the last position of each chunk
    slots: Tensor  # (n,) int64: the sequence's row in the cache, all different
    max_chunk_length: int
    context_length: int  # the largest position + 1


@runtime_checkable
class RaggedDecoding(Protocol):
    """A prior with a key-value cache for chunks of different lengths; sliding windows need it to be fast."""

    sequence_bytes: int  # of the keys and values of one sequence

    def allocate_cache(self, sequences: int) -> Any: ...  # an empty cache for so many sequences

    def decode_chunks(self, chunks: RaggedChunks, cache: Any) -> Tensor:
        """Logits (n, V) of the token after each chunk."""
        ...


class Sampler(Protocol):
    """Samples tokens from a prior.

    Optional keyword parameters of `__call__`, passed if declared:

    * `known`: (B, h * w) tokens to keep, -1 where a token is to be sampled; or None.
    * `null_prefix`: the conditioner's `null_prefix(batch)`, (B, M) or None.
    * `window`: the grid (h, w) of the prior's training. With it, `prefix` and `null_prefix` are functions from a
      window's start and size to (B, M).

    Optional member, of the class: `speed_options`, names of the options that change no token: an
    evaluation's protocol leaves them out.
    """

    def __call__(self, prior: Any, prefix: Tensor, grid: Size, *, seed: int, first: int = 0) -> Tensor:
        """Sample (B, h * w) tokens. Sample i depends on `seed` and `first + i` alone, not on the batch size."""
        ...


@dataclass
class ScoredSamples:
    """A scorer's input."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    tokens: Tensor  # (B, N)
    prior: Any
    prefix: Tensor | None  # (B, M); None for images larger than the prior's grid
    labels: Tensor | None  # (B,)
    classes: Sequence[str]  # names of all labels


class Scorer(Protocol):
    """Scores candidates of one sample; the best is kept."""

    def __call__(self, samples: ScoredSamples) -> Tensor: ...  # -> (B,), higher is better


# Data.


class Split(Protocol):
    """Training or validation images. `item` is a pure function of seed, epoch and index."""

    fingerprint: str  # changes when the images do

    def __len__(self) -> int: ...

    def item(self, epoch: int, index: int) -> Sample: ...


@runtime_checkable
class StreamingSplit(Protocol):
    """A split that is fast only for rising indices; training streams it, in no exact order."""

    max_readers: int  # processes that can share it: ranks times data workers

    def stream(self, start: int, rank: int, world_size: int) -> Iterator[Sample]: ...  # endless, from step `start`


class ConditionReader(Protocol):
    """Reads a condition map from a file as its data source does, or raises ValueError.

    Readers with the same options are equal (`__eq__`).

    Optional member: `options` of `data=shard_pairs` that read such maps; by default a shard's channels decide.
    """

    num_classes: int  # of a label map, C; 0 where a map is an image

    def __call__(self, path: Path) -> Tensor: ...  # -> (C, H, W), not resized


class Data(Protocol):
    """A source of images. Wired: image_size, seed.

    Optional member: `condition_reader(...)`, a static function from some of the options, by name, to a
    `ConditionReader`. It opens no data.
    """

    classes: Sequence[str]  # names of the labels; empty where there are none

    def split(self, name: str) -> Split:
        """The split "train" or "validation".

        Raises:
            EmptySplitError: If it has no image.
        """
        ...


# Evaluation.


@dataclass
class Reconstruction:
    """The input of a metric."""

    images: Tensor  # (B, 3, H, W)
    reconstructions: Tensor  # (B, 3, H, W), clamped to [-1, 1]
    indices: Tensor  # (B, h, w)
    masks: Tensor | None = None  # (B, 1, H, W)


class Metric(Protocol):
    """Numbers over validation images. Wired: vocab_size, device.

    Optional members:

    * `intervals()`: the 95 % interval (low, high) of some numbers, by name.
    * `indices_only = True`: reads indices alone, and so measures samples of a prior too.
    * `higher_is_better`, of the class: True or False for each number that can choose a checkpoint, by name.
    """

    def update(self, batch: Reconstruction) -> None: ...

    def compute(self) -> dict[str, float]: ...


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


# Runs.

VALIDATION_PREFIX = "validation/"  # of the log keys of validation metrics


class Logger(Protocol):
    """A destination of numbers and images. Wired: run_dir, config, subrun.

    `subrun` is the run's name in the folder above, as "stage1" of pipeline=full, or "".
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def images(self, step: int, name: str, images: Tensor) -> None: ...  # (B, 3, H, W), shown as a grid

    def close(self) -> None: ...


class Pipeline(Protocol):
    """A job of `python -m vqf.run`. Wired: config, run_dir.

    Optional member, of the class: `distributed = True` lets it run in every process of torchrun; others are refused.
    """

    def run(self) -> float | None: ...  # what a sweeper minimizes


def to_steps(value: float, steps: int) -> int:
    """Convert a number of steps, or below 1 a fraction of the run, to steps."""
    return round(value * steps) if 0 < value < 1 else int(value)
