"""The interface of each kind of component. A plugin inherits nothing: it has the members of one of these protocols.

Shapes, everywhere in vqf (B images, C channels, stride = pixels per cell and side):

| value | dtype, shape | range |
| --- | --- | --- |
| images | float (B, 3, H, W); condition maps (B, C, H, W) | [-1, 1] |
| latents | float (B, D, h, w), h = H / stride, w = W / stride | |
| indices | int64 (B, h, w), or (B, h, w, K) for K codebooks | [0, vocab_size) |
| tokens | int64 (B, N), N = h * w: the indices row by row | [0, vocab_size) |
| prefix | int64 (B, M): the tokens of a condition, in a vocabulary of their own | [0, prefix_vocab) |

*Wired* parameters of a constructor are passed by the pipeline, by name; a component declares those it needs. All its
other parameters are options of the config.

*Optional members* are looked up by name: a component without one gets the default that is stated there.
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
    """The output of a quantizer."""

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

    Optional members, for large images to be decoded in tiles with `features = local_features(global_features)`:

    * `global_features(latents)`, (B, dim, h, w) -> (B, D, h, w): the layers in which a cell may depend on all cells.
    * `local_features(cells)`: the other layers, which are local except for group norms. Tiles pass through them.

    Without these two, tiles pass through the full decoder.
    """

    stride: int
    last_layer: nn.Module  # a plain convolution or linear layer, where the adaptive weight compares gradients

    def features(self, latents: Tensor) -> Tensor: ...  # the input of `last_layer`

    def __call__(self, latents: Tensor) -> Tensor: ...  # (B, dim, h, w) -> (B, 3, H, W)


class Quantizer(Protocol):
    """Latents to indices and back. In eval mode `lookup(q(z).indices)` equals `q(z).latents`.

    Optional member:

    * `update() -> dict[str, Tensor]` advances state that is not trained by gradient (an EMA codebook, a temperature),
      and returns scalars for the log. It is called once after every optimizer step that was taken, however many
      micro-batches or forwards without gradients the step had.
    """

    dim: int  # channels of its latents; the tokenizer projects to and from them
    vocab_size: int

    def __call__(self, latents: Tensor) -> Quantized: ...

    def lookup(self, indices: Tensor) -> Tensor: ...  # (B, h, w) -> (B, dim, h, w)


class Loss(Protocol):
    """A distance between reconstructions and images.

    Optional members, both attributes of the class:

    * `channels`: the numbers of image channels that it can compare; any by default.
    * `expects_logits = True`: reconstructions are logits of the classes of a label map.
    """

    weight: float

    def __call__(self, reconstructions: Tensor, images: Tensor) -> Tensor: ...  # -> ()


class Discriminator(Protocol):
    """Images to logits of being real, of any shape led by B. Wired: in_channels."""

    def __call__(self, images: Tensor) -> Tensor: ...


class Adversary(Protocol):
    """The GAN objective: the losses of generator and discriminator, their start and their weight. Wired: steps."""

    start_step: int  # the first step at which the discriminator learns
    refresh_fakes: bool  # whether the discriminator sees reconstructions of the already updated tokenizer

    def generator_loss(self, fake: Tensor) -> Tensor: ...  # logits -> ()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor: ...  # logits -> ()

    def adaptive_weight(self, rec_grad: Tensor, gan_grad: Tensor) -> Tensor:
        """Weight of the generator's loss, from both gradients at the decoder's last layer. -> ()."""
        ...

    def weight_at(self, step: int) -> float:
        """Multiplier in [0, 1] of the generator's GAN loss at a step. At 0 the discriminator is not evaluated."""
        ...


@dataclass
class DiscriminatorOutput:
    """The discriminator's logits of a batch, as a regularizer sees them."""

    discriminator: nn.Module
    images: Tensor  # (B, 3, H, W)
    real_logits: Tensor  # logits of the images
    fake_logits: Tensor  # logits of their reconstructions
    step: int  # counted from the start of the run


class Regularizer(Protocol):
    """A term of the discriminator's loss beside the adversary's.

    Optional member:

    * `last_value`: a tensor, logged in place of the term at steps that do not compute it.
    """

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
    a function from the folder of another run to the `ImageCodec` of that run.

    Optional members:

    * `batch_field`: the field of a batch that holds the condition: `conditions` (default), `images`, `crop_boxes`.
    * `channels`, of a condition that is an image: its C.
    * `size_multiple`, of a condition that is an image: the number of pixels that must divide its sides; 1 by default.
    * `positions`: for each of the M tokens its `GridPosition` in the image, None for a token without one (default).
    * `prepare(batch)`: tokenizes condition images, once, and returns the batch with their indices in
      `condition_indices`. These are cached with the tokens, and cropped to each window of a larger grid.
    * `prepare_shifted(batch)`: the same for a condition whose cells are p by q cells of the image. Its indices are
      (B, p, q, h, w): [:, i, j] are those of the condition without its first i rows and j columns of image cells.
    * `null_prefix(batch)`: the prefix (B, M) of no condition, or None if the prior has never seen one (default).
    * `dropout`: share of training samples whose prefix is replaced by `null_prefix`, 0 by default. With several
      conditioners see `vqf.models.conditioning.ConditionerStack`.
    * `render(batch)`: an image of the condition, (B, C, H, W), for logs and sample grids.
    """

    vocab_size: int
    length: int  # M

    def __call__(self, batch: Batch) -> Tensor: ...  # -> (B, M) int64


class Prior(Protocol):
    """A distribution over token sequences.

    Wired: vocab_size; length, h * w; grid, (h, w); prefix_vocab; prefix_length, M; prefix_positions, of each prefix
    token the `GridPosition` or None.
    """

    vocab_size: int

    def __call__(self, tokens: Tensor, prefix: Tensor) -> Tensor: ...  # (B, N), (B, M) -> logits (B, N, V)

    def loss(self, tokens: Tensor, prefix: Tensor) -> Tensor: ...  # -> () nats per token, differentiable


@runtime_checkable
class Autoregressive(Protocol):
    """A prior with a key-value cache for sequences that advance together, one token at a time."""

    def prefill(self, prefix: Tensor) -> tuple[Tensor, Any]: ...  # (B, M) -> logits (B, V) of token 0, cache

    def decode(self, token: Tensor, cache: Any) -> Tensor: ...  # (B,), cache -> logits (B, V) of the next token


@dataclass
class RaggedChunks:
    """Chunks of n sequences [prefix; tokens], concatenated to T positions without padding, for one pass of a prior.

    The cache holds every position of a sequence before its chunk. Entries of later positions are stale, and masked.

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
    """A prior with a key-value cache for sequences that advance by chunks of different lengths.

    Sliding windows are fast only with such a prior.
    """

    sequence_bytes: int  # of the keys and values of one sequence

    def allocate_cache(self, sequences: int) -> Any: ...  # an empty cache for so many sequences

    def decode_chunks(self, chunks: RaggedChunks, cache: Any) -> Tensor:
        """Logits (n, V) of the token after each chunk."""
        ...


class Sampler(Protocol):
    """Samples tokens from a prior.

    Optional keyword parameters of `__call__`, passed to a sampler that declares them:

    * `known`: (B, h * w) tokens to keep, -1 where a token is to be sampled; or None.
    * `null_prefix`: the conditioner's `null_prefix(batch)`, (B, M) or None; guidance needs it.
    * `window`: the grid (h, w) that the prior was trained on. A sampler that declares it gets `prefix` and
      `null_prefix` as functions from a window's start and size to (B, M).

    Optional member:

    * `speed_options`, of the class: names of the options that change no token. An evaluation's protocol leaves them
      out.
    """

    def __call__(self, prior: Any, prefix: Tensor, grid: Size, *, seed: int, first: int = 0) -> Tensor:
        """Sample (B, h * w) tokens. Sample i depends on `seed` and `first + i` alone, not on the batch size."""
        ...


@dataclass
class ScoredSamples:
    """The samples that a scorer compares, with all that was known about them."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    tokens: Tensor  # (B, N)
    prior: Any
    prefix: Tensor | None  # (B, M); None for images larger than the prior's grid
    labels: Tensor | None  # (B,)
    classes: Sequence[str]  # names of all labels


class Scorer(Protocol):
    """Scores candidates of the same sample; the best is kept."""

    def __call__(self, samples: ScoredSamples) -> Tensor: ...  # -> (B,), higher is better


# Data.


class Split(Protocol):
    """The training or validation images of a data source. `item` is a pure function of seed, epoch and index."""

    fingerprint: str  # changes when the images do

    def __len__(self) -> int: ...

    def item(self, epoch: int, index: int) -> Sample: ...


@runtime_checkable
class StreamingSplit(Protocol):
    """A split that is fast only for rising indices. Training reads it as a stream, in no exact order."""

    max_readers: int  # processes that can share it: ranks times data workers

    def stream(self, start: int, rank: int, world_size: int) -> Iterator[Sample]: ...  # endless, from step `start`


class ConditionReader(Protocol):
    """Reads a condition map from a file in the way a data source reads its own. Raises ValueError for other files.

    Implement `__eq__`: two readers with the same options compare equal, so that a union can check its parts.

    Optional member:

    * `options`: the options of `data=shard_pairs` that read such maps. Without it the maps of a shard are read by
      their channels.
    """

    num_classes: int  # of a label map, C; 0 where a map is an image

    def __call__(self, path: Path) -> Tensor: ...  # -> (C, H, W), not resized


class Data(Protocol):
    """A source of images. Wired: image_size, seed.

    Optional member:

    * `condition_reader(...)`, of a source with condition maps: a static function that takes some of its options by
      name and returns a `ConditionReader`. It opens no data: a run is sampled on machines without the data, too.
    """

    classes: Sequence[str]  # names of the labels; empty where there are none

    def split(self, name: str) -> Split:
        """The split "train" or "validation".

        Raises:
            EmptySplitError: If it has no image. Pipelines that can use one split alone catch it.
        """
        ...


# Evaluation.


@dataclass
class Reconstruction:
    """The input of a metric: images, their reconstructions, and the indices in between."""

    images: Tensor  # (B, 3, H, W)
    reconstructions: Tensor  # (B, 3, H, W), clamped to [-1, 1]
    indices: Tensor  # (B, h, w)
    masks: Tensor | None = None  # (B, 1, H, W)


class Metric(Protocol):
    """Numbers over validation images. Wired: vocab_size, device.

    Optional members:

    * `intervals()`: the 95 % interval (low, high) of some of the numbers, by name.
    * `indices_only = True`: reads indices alone, and so measures samples of a prior as well.
    * `higher_is_better`, of the class: True or False by name of the number. Such a number can choose the best
      checkpoint, and orders a comparison.
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
    """A metric between a set of generated images and a set of real ones, by features. Wired: device.

    As a `Metric` it compares reconstructions with their originals.
    """

    network: FeatureNetwork
    reconstruction_prefix: str  # of its names for reconstructions: "r", as in rFID

    def update(self, batch: Reconstruction) -> None: ...

    def compute(self) -> dict[str, float]: ...

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult: ...


class EvaluationProtocol(Protocol):
    """What is measured on which images: a frozen dataclass whose fields are lines of the result. Wired: nothing."""

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
    """A destination of a run's numbers and images. Wired: run_dir, config, subrun.

    `subrun` is the name of this folder's run in the folder above, as "stage1" of pipeline=full; "" for a run by itself.
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def images(self, step: int, name: str, images: Tensor) -> None: ...  # (B, 3, H, W), shown as a grid

    def close(self) -> None: ...


class Pipeline(Protocol):
    """A job of `python -m vqf.run`, chosen by `pipeline=`. Wired: config, run_dir.

    Optional member:

    * `distributed = True`, of the class: runs in every process that torchrun starts. Other pipelines are refused there.
    """

    def run(self) -> float | None: ...  # what a sweeper minimizes


def to_steps(value: float, steps: int) -> int:
    """Convert a number of steps, or below 1 a fraction of the run, to a number of steps."""
    return round(value * steps) if 0 < value < 1 else int(value)
