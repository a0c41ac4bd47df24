"""What each kind of component promises. A plugin inherits nothing: it only has to fit.

Shapes, everywhere in vqf:

* images are float tensors (B, 3, H, W) in [-1, 1];
* latents are (B, D, h, w), with h = H / stride and w = W / stride;
* indices are int64 (B, h, w), or (B, h, w, K) for K codebooks, in [0, vocab_size);
* tokens are int64 (B, N), the indices row by row;
* a prefix is int64 (B, M), the tokens of a condition, in a vocabulary of their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from vqf.batch import Batch, Sample, Size


@dataclass
class Quantized:
    """What a quantizer makes of latents."""

    latents: Tensor  # (B, D, h, w), gradients pass straight through
    indices: Tensor  # (B, h, w) int64 in [0, vocab_size)
    loss: Tensor  # () codebook and commitment terms, 0 where there are none
    stats: Mapping[str, Tensor] = field(default_factory=dict)  # detached scalars for the log


@dataclass
class Reconstruction:
    """What a metric looks at: held-out images, what the tokenizer made of them, and through which codes."""

    images: Tensor  # (B, 3, H, W)
    reconstructions: Tensor  # (B, 3, H, W), clamped to [-1, 1]
    indices: Tensor  # (B, h, w)
    masks: Tensor | None = None  # (B, 1, H, W)


class Encoder(Protocol):
    """Images to latents. Wired: in_channels, image_size."""

    dim: int  # channels of the latents
    stride: int  # pixels per latent cell and side

    def __call__(self, images: Tensor) -> Tensor: ...  # (B, 3, H, W) -> (B, dim, h, w)


class Decoder(Protocol):
    """Latents to images: `last_layer(features(latents))`. Wired: dim, out_channels, image_size.

    One may have `features` in two parts: `local_features(global_features(latents))`. `global_features` returns a cell
    for every code, which may depend on all of them; `local_features` is local, but for group norms, so that large
    images go through it in tiles.
    """

    stride: int
    last_layer: nn.Module  # a plain convolution or linear layer, where the adaptive weight compares gradients

    def features(self, latents: Tensor) -> Tensor: ...  # what `last_layer` is applied to

    def __call__(self, latents: Tensor) -> Tensor: ...  # (B, dim, h, w) -> (B, 3, H, W)


class Quantizer(Protocol):
    """Latents to codes. In eval mode `lookup(q(z).indices)` equals `q(z).latents`.

    What it moves by itself in training (averages, a temperature) it moves in a method `update() -> dict[str, Tensor]`,
    if it has one: called once after an optimizer step that was taken, however many micro-batches or forwards without
    gradients there were in it; the scalars go to the log.
    """

    dim: int  # channels it quantizes; the tokenizer projects to and from it
    vocab_size: int

    def __call__(self, latents: Tensor) -> Quantized: ...

    def lookup(self, indices: Tensor) -> Tensor: ...  # (B, h, w) -> (B, dim, h, w)


class Loss(Protocol):
    """A distance between reconstructions and images.

    One that compares images alone has their numbers of `channels` as an attribute of its class; one for maps of
    classes, of which reconstructions are logits, has `expects_logits = True`.
    """

    weight: float

    def __call__(self, reconstructions: Tensor, images: Tensor) -> Tensor: ...  # -> ()


class Discriminator(Protocol):
    """Images to logits of being real, of any shape led by B. Wired: in_channels."""

    def __call__(self, images: Tensor) -> Tensor: ...


class Adversary(Protocol):
    """The GAN objective: what each player minimises, from which step, and how much it weighs. Wired: steps."""

    start_step: int  # the first step at which the discriminator learns
    refresh_fakes: bool  # whether it judges what the tokenizer draws after its own update

    def generator_loss(self, fake: Tensor) -> Tensor: ...  # logits -> ()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor: ...  # logits -> ()

    def adaptive_weight(self, rec_grad: Tensor, gan_grad: Tensor) -> Tensor:
        """Weigh the generator's loss from both gradients at the decoder's last layer. -> ()."""
        ...

    def weight_at(self, step: int) -> float: ...  # share in [0, 1] of its verdict that counts at a step; 0: not asked


@dataclass
class DiscriminatorOutput:
    """What a discriminator made of a batch."""

    discriminator: nn.Module
    images: Tensor  # (B, 3, H, W)
    real_logits: Tensor  # logits of the images
    fake_logits: Tensor  # logits of their reconstructions
    step: int  # counted from the start of the run


class Regularizer(Protocol):
    """A term that the discriminator minimises beside the adversary's loss.

    One that is not computed at every step has a tensor `last_value`, what the log shows instead.
    """

    weight: float

    def __call__(self, output: DiscriminatorOutput) -> Tensor: ...  # -> ()


class ImageCodec(Protocol):
    """What a conditioner needs of a tokenizer."""

    vocab_size: int
    stride: int
    channels: int  # of its images

    def encode(self, images: Tensor) -> Tensor: ...  # (B, C, H, W) -> (B, H / stride, W / stride) int64

    def decode(self, indices: Tensor) -> Tensor: ...  # (B, h, w) -> (B, C, h * stride, w * stride)


class Conditioner(Protocol):
    """What stage 2 is told about an image, as tokens in front of it.

    Wired: num_classes; grid, of the codes of an image; tokenizer, a `ImageCodec` of the images; open_tokenizer,
    which gives the `ImageCodec` of another run by the run's folder.

    One that has a method `prepare(batch)` turns images into codes in it, once, and returns the batch with those
    codes. They are cached with the tokens, and cut to what a window covers. One that has a method `null_prefix(batch)`
    says there what stands for no condition, (B, M), or None. One that has a method `render(batch)` draws what it is
    told, (B, C, H, W). One that is told by images has their `channels`, and `size_multiple`, the pixels that divide
    their sides. One whose tokens speak of places in the image has `positions`, M of them. Where `dropout` is a share
    above 0, training puts what `null_prefix` says in its place that often, for several conditioners at once; see
    `vqf.models.conditioning.ConditionerStack`.
    One whose codes are larger than those of the image may have a method `prepare_shifted(batch)`: its codes are then
    (B, p, q, h, w), where [:, i, j] are those of the images without their first i rows and j columns of codes.
    `batch_field` names the field of a batch that it is told by: `conditions` by default, `images` or `crop_boxes`.
    """

    vocab_size: int
    length: int  # M

    def __call__(self, batch: Batch) -> Tensor: ...  # -> (B, M) int64


class Prior(Protocol):
    """A distribution over token sequences.

    Wired: vocab_size; length, h * w; grid, (h, w); prefix_vocab; prefix_length, M; prefix_positions, for each token
    of the prefix the `GridPosition` that it speaks of, None where it speaks of none.
    """

    vocab_size: int

    def __call__(self, tokens: Tensor, prefix: Tensor) -> Tensor: ...  # (B, N), (B, M) -> logits (B, N, V)

    def loss(self, tokens: Tensor, prefix: Tensor) -> Tensor: ...  # -> () nats per token, differentiable


@runtime_checkable
class Autoregressive(Protocol):
    """A prior that can also be fed one token at a time, remembering keys and values."""

    def prefill(self, prefix: Tensor) -> tuple[Tensor, Any]: ...  # (B, M) -> logits (B, V) of token 0, a cache

    def decode(self, token: Tensor, cache: Any) -> Tensor: ...  # (B,), cache -> logits (B, V) of the next token


@dataclass
class RaggedChunks:
    """Parts of n sequences [prefix; tokens], end to end, that a prior reads in one pass.

    The cache holds all positions of a sequence before its piece. It may hold later ones, which mean nothing.
    """

    ids: Tensor  # (T,) int64, of the prefix where the position is one of its M, of a token elsewhere
    positions: Tensor  # (T,) int64, in the sequence
    chunk_indices: Tensor  # (T,) int64 in [0, n), the piece that a token belongs to; rising
    ends: Tensor  # (n,) int64, where in T the last token of each piece is
    slots: Tensor  # (n,) int64, the place of each sequence in the cache, no two alike
    max_chunk_length: int  # tokens of the longest piece
    context_length: int  # one more than the largest position


@runtime_checkable
class RaggedDecoding(Protocol):
    """A prior that can also read pieces of many sequences at once, each of its own length, remembering keys and values.

    What sliding windows need to be fast.
    """

    sequence_bytes: int  # of the keys and values of one sequence

    def allocate_cache(self, sequences: int) -> Any: ...  # an empty cache for so many sequences

    def decode_chunks(
        self, chunks: RaggedChunks, cache: Any
    ) -> Tensor: ...  # -> logits (n, V) of the token after each piece


class Sampler(Protocol):
    """Draws tokens from a prior."""

    def __call__(self, prior: Any, prefix: Tensor, grid: Size, *, seed: int, first: int = 0) -> Tensor:
        """Draw (B, h * w) tokens.

        Sample i of the batch depends on `seed` and `first + i` alone, not on the size of the batch.

        A sampler whose signature has one of these keywords is given it, too: `known`, (B, h * w) tokens to keep,
        -1 where one is to be drawn; `null_prefix`, what the conditioner's `null_prefix(batch)` says in place of a
        condition, None where it has none; `window`, the grid that the prior was trained on. One that takes `window`
        is given both prefixes as functions of a window's start and size that return (B, M).

        Options that `speed_options` of its class lists change no token: they are no lines of an evaluation's protocol.
        """
        ...


@dataclass
class ScoredSamples:
    """Samples that a scorer looks at."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    tokens: Tensor  # (B, N)
    prior: Any
    prefix: Tensor | None  # (B, M); None where the image is larger than what the prior models at once
    labels: Tensor | None  # (B,)
    classes: Sequence[str]  # names of all labels


class Scorer(Protocol):
    """Says which of several samples is best."""

    def __call__(self, samples: ScoredSamples) -> Tensor: ...  # -> (B,), the higher the better


class Split(Protocol):
    """One part of a data source. `item` is a pure function of the source's seed, epoch and index."""

    fingerprint: str  # changes when the images do

    def __len__(self) -> int: ...

    def item(self, epoch: int, index: int) -> Sample: ...


@runtime_checkable
class StreamingSplit(Protocol):
    """A split whose `item` is quick only for indices that rise; it is trained on as it comes, in no exact order."""

    max_readers: int  # processes that can share it, those that load data counted

    def stream(self, start: int, rank: int, world_size: int) -> Iterator[Sample]: ...  # from a step on, without end


class ConditionReader(Protocol):
    """Reads a map from a file as the samples of a data source have theirs. A ValueError says why it cannot.

    Two that read alike are equal. One may have `options`, those of `data=shard_pairs` that read such maps; without it
    the maps of a shard are read by their channels.
    """

    num_classes: int  # where every channel is a class; 0 where a map is an image

    def __call__(self, path: Path) -> Tensor: ...  # -> (C, H, W), a pixel of the file for a pixel


class Data(Protocol):
    """A source of images. Wired: image_size, seed.

    One with maps beside its images has a function of its class, `condition_reader`, that takes some of its options by
    name and returns a `ConditionReader`. It opens no data: a run is also sampled where its data is not.
    """

    classes: Sequence[str]  # names of the labels; empty where there are none

    # "train" or "validation"; an EmptyPartError where it holds no image, which a pipeline for both goes without
    def split(self, name: str) -> Split: ...


class Metric(Protocol):
    """Numbers over held-out images. Wired: vocab_size, device.

    One that has a method `intervals()` gives the 95 % interval of some of its numbers there, as (low, high). One whose
    attribute `indices_only` is true looks at the codes alone, and is asked about samples of a prior, too. One whose
    class has `higher_is_better`, true or false by the names of its numbers, can choose the best checkpoint, and is
    sorted that way in a comparison.
    """

    def update(self, batch: Reconstruction) -> None: ...

    def compute(self) -> dict[str, float]: ...


@dataclass
class FeatureSet:
    """What a feature network sees in a set of images, on the CPU."""

    count: int | None  # images behind mean and covariance; None where a file does not say
    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64, divided by count - 1
    features: Tensor  # (n, D) float32 of n of them, spread evenly, for metrics that look at single images
    logits: Tensor | None = None  # (n, C) float32 of the same, where the network is a classifier


@dataclass
class SetMetricResult:
    """What a set metric says."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %, of some of the values
    settings: dict[str, Any] = field(default_factory=dict)  # what an option came to where it depends on the sets


class FeatureNetwork(Protocol):
    """Describes an image by a vector."""

    name: str
    digest: str  # of its weights, and of how it scales images

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...  # -> (B, D), logits (B, C) of a classifier


@runtime_checkable
class SetMetric(Protocol):
    """A metric that compares a set of images with a set of real ones, by features. Wired: device.

    As a `Metric` it compares reconstructions with their originals.
    """

    network: FeatureNetwork
    reconstruction_prefix: str  # of its names where the images are reconstructions: r, as in rFID

    def update(self, batch: Reconstruction) -> None: ...

    def compute(self) -> dict[str, float]: ...

    def compare(self, real: FeatureSet, generated: FeatureSet) -> SetMetricResult: ...


class EvaluationProtocol(Protocol):
    """What is measured on which images; a frozen dataclass whose fields are lines of the result. Wired: nothing."""

    task: str  # "reconstruction" or "generation"
    part: str  # of the data: what is reconstructed, or held out
    count: int | None  # images that are reconstructed or generated; all, or as many as the reference has
    crop: str
    resize: str
    rounding: str
    reference: str  # "originals", a part of the data, or a file
    seed: int


VALIDATION_PREFIX = "validation/"  # of the log keys of validation metrics


class Logger(Protocol):
    """Where numbers and images of a run go. Wired: run_dir, config, subrun.

    `part` says what the folder is of the run in the folder above, as "stage1" of pipeline=full; "" where it is a run.
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def images(self, step: int, name: str, images: Tensor) -> None: ...  # (B, 3, H, W), a grid of them

    def close(self) -> None: ...


class Pipeline(Protocol):
    """One thing that `python -m vqf.run` can do. Wired: config, run_dir.

    One with the attribute `distributed = True` runs in every process that torchrun starts; others are refused there.
    """

    def run(self) -> float | None: ...  # what a sweeper minimises


def to_steps(value: float, steps: int) -> int:
    """Read a number of steps, or below 1 a share of the run."""
    return round(value * steps) if 0 < value < 1 else int(value)
