"""Stage 2: prior, conditioners, samplers, scorers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vqf.batch import Batch, GridPosition, Size
from vqf.tokens.layout import TokenLayout
from vqf.tokens.prefix import Prefix


class ImageCodec(Protocol):
    """The part of a tokenizer that a conditioner uses."""

    layout: TokenLayout  # of images of the size of training
    channels: int  # C of its images

    def encode(self, images: Tensor) -> Tensor: ...  # (B, C, H, W) -> (B, H / stride, W / stride) int64

    def decode(self, indices: Tensor) -> Tensor: ...  # (B, h, w) -> (B, C, h * stride, w * stride)

    def to_rgb(self, images: Tensor) -> Tensor: ...  # (B, C, H, W) -> colors (B, 3, H, W)


class Conditioner(Protocol):
    """A condition to the prefix tokens in front of the tokens of an image.

    Wired: num_classes; layout, the `TokenLayout` of the image; tokenizer, the `ImageCodec` of the images;
    open_tokenizer, a function from the folder of another run to its `ImageCodec`.
    """

    vocab_size: int
    length: int  # M

    def __call__(self, batch: Batch) -> Tensor: ...  # -> (B, M) int64 in [0, vocab_size)


@runtime_checkable
class Embedded(Protocol):
    """A conditioner whose prefix, and null prefix, are embeddings (B, M, embedding_dim); its `vocab_size` is 0."""

    embedding_dim: int


@runtime_checkable
class Positioned(Protocol):
    """A conditioner whose tokens have places in the image."""

    positions: Sequence[GridPosition | None]  # of each of the M tokens


@runtime_checkable
class ReadsField(Protocol):
    """A conditioner of a field of a batch other than the labels."""

    batch_field: str  # "conditions", "images" or "crop_boxes"


@runtime_checkable
class ReadsImages(ReadsField, Protocol):
    """A conditioner of images: `batch_field` is "conditions" or "images"."""

    channels: int  # C
    size_multiple: int  # must divide the sides in pixels

    def show(self, images: Tensor) -> Tensor: ...  # (B, C, H, W) -> colors (B, 3, H, W)


@runtime_checkable
class Prepares(Protocol):
    """A conditioner of images whose indices are cached with the tokens of stage 2, and cropped to windows."""

    def prepare(self, batch: Batch) -> Batch:
        """Add the indices of the condition to `condition_indices`."""
        ...


@runtime_checkable
class PreparesShifted(Prepares, Protocol):
    """One whose cells are as large as p x q cells of the image."""

    def prepare_shifted(self, batch: Batch) -> Batch:
        """Add indices (B, p, q, h, w): [:, i, j] are those of the condition without its first i rows and j columns."""
        ...


@runtime_checkable
class Droppable(Protocol):
    """A conditioner that training drops at random, which guidance needs.

    For several conditioners see `vqf.models.conditioning.ConditionerStack`.
    """

    dropout: float  # share of training samples with the null prefix

    def null_prefix(self, batch: Batch) -> Tensor | None:
        """The prefix of no condition; None if the prior has never seen one."""
        ...


@runtime_checkable
class Renders(Protocol):
    """A conditioner that can show what its tokens hold."""

    def render(self, batch: Batch) -> Tensor: ...  # -> colors (B, 3, H, W)


class Prior(Protocol):
    """A model of the tokens of an image. `likelihood` is a member of the class.

    Wired: layout, a `TokenLayout`; prefix, a `PrefixSpec`; quantizer, the frozen one of the tokenizer, which a prior
    keeps in a list so that its weights are not saved twice. It is `Causal` or `Masked`.
    """

    layout: TokenLayout
    likelihood: bool  # whether the loss is the mean -log p of a token, in nats

    def loss(self, tokens: Tensor, prefix: Prefix) -> Tensor: ...  # (B, T) -> (), differentiable


@runtime_checkable
class Causal(Protocol):
    """A prior that draws group after group of tokens, with a cache for sequences that advance together.

    One token a group in GPT, one scale in VAR. The groups of an image of fewer rows are the first of these.
    """

    layout: TokenLayout
    groups: Sequence[int]  # number of tokens that are drawn at once, in order

    def __call__(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        """Logits (B, n, V) of the tokens (B, n) of the first groups, each given the groups before its own.

        The tokens of the last of these groups are not read, and may be -1.
        """
        ...

    def prefill(self, prefix: Prefix) -> tuple[Tensor, Any]:
        """Logits (B, groups[0], V), and a cache."""
        ...

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """Read the tokens (B, g) of a group. Returns the logits (B, g', V) of the next."""
        ...


@runtime_checkable
class Masked(Protocol):
    """A prior that predicts all unknown tokens at once, given the known ones."""

    layout: TokenLayout

    def predict(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        """Logits (B, T, V) of all tokens, of which those of value -1 are unknown."""
        ...


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
    """A prior with a key-value cache for chunks of different lengths; sliding windows need it to be fast.

    Its prefix is ids alone, its groups are single tokens.
    """

    layout: TokenLayout
    sequence_bytes: int  # of the keys and values of one sequence

    def allocate_cache(self, sequences: int) -> Any: ...  # an empty cache for so many sequences

    def decode_chunks(self, chunks: RaggedChunks, cache: Any) -> Tensor:
        """Logits (n, V) of the token after each chunk."""
        ...


@runtime_checkable
class HasSpeedOptions(Protocol):
    """A sampler or scorer with options that change no token; an evaluation's protocol leaves them out."""

    speed_options: frozenset[str]  # names, of the class


class Sampler(Protocol):
    """Samples tokens from a prior. The members are of the class."""

    draws: type  # the capability of a prior that it draws from: `Causal` or `Masked`
    keeps_known: bool  # whether it can keep known tokens

    def __call__(
        self,
        prior: Any,
        prefix: Prefix,
        layout: TokenLayout,
        *,
        seed: int,
        first: int = 0,
        known: Tensor | None = None,
        null_prefix: Prefix | None = None,
    ) -> Tensor:
        """Sample tokens (B, T). Sample i depends on `seed` and `first + i` alone, not on the batch size.

        Args:
            layout: Of the images to sample; that of the prior's training, or a start of it.
            known: (B, T) tokens to keep, -1 where a token is to be sampled.
            null_prefix: The prefix of no condition; None if the prior has never seen one.
        """
        ...


WindowPrefix = Callable[[Size, Size], Prefix]  # from start and size of a window of cells to its prefix


@runtime_checkable
class Windowed(Protocol):
    """A sampler of rasters of any size, given functions `WindowPrefix` in place of prefixes."""

    window: Size | None  # rows and columns that the prior reads at once; None: as in its training


@dataclass
class ScoredSamples:
    """A scorer's input."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    tokens: Tensor  # (B, T)
    prior: Any
    prefix: Prefix | None  # None for images larger than those of the prior's training
    labels: Tensor | None  # (B,)
    classes: Sequence[str]  # names of all labels


class Scorer(Protocol):
    """Scores candidates of one sample; the best is kept."""

    def __call__(self, samples: ScoredSamples) -> Tensor: ...  # -> (B,), higher is better
