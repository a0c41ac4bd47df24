"""Stage 1: encoder, quantizer, decoder, losses, discriminator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from vqf.batch import Size
from vqf.tokens.layout import TokenLayout


@dataclass
class Quantized:
    """A quantizer's output."""

    latents: Tensor  # (B, D, h, w) code vectors; gradients reach the encoder through them
    indices: Tensor  # int64: (B, h, w), with K codebooks (B, h, w, K), with several scales (B, T)
    loss: Tensor  # () codebook and commitment terms, 0 where there are none
    stats: Mapping[str, Tensor] = field(default_factory=dict)  # detached scalars for the log


class Encoder(Protocol):
    """Images to latents. Wired: in_channels; image_size, (H, W).

    With `stride = None` it has the capability `Unplaced`.
    """

    dim: int  # channels of the latents
    stride: int | None  # pixels per latent cell and side; None if cells have no places in the image

    def __call__(self, images: Tensor) -> Tensor: ...  # (B, 3, H, W) -> (B, dim, h, w)


@runtime_checkable
class Unplaced(Protocol):
    """An encoder of images of one size to N latents without places: `stride` is None, latents are (B, dim, 1, N)."""

    num_latents: int  # N


@runtime_checkable
class Pretrained(Protocol):
    """An encoder that can start from weights trained elsewhere."""

    def load_pretrained(self) -> None:
        """Load them. Called once, where training starts from nothing else; a checkpoint holds its own weights."""
        ...


class Decoder(Protocol):
    """Latents to images: `last_layer(features(latents))`. Wired: dim, out_channels; image_size, (H, W)."""

    stride: int | None
    last_layer: nn.Module  # a (transposed) convolution or linear layer, where the adaptive weight compares gradients

    def features(self, latents: Tensor) -> Tensor: ...  # the input of `last_layer`

    def __call__(self, latents: Tensor) -> Tensor: ...  # (B, dim, h, w) -> (B, 3, H, W)


@runtime_checkable
class TiledEncoding(Protocol):
    """An encoder, `global_features(local_features(images))`; tiles of others pass through all layers."""

    def local_features(self, images: Tensor) -> Tensor:
        """Layers that are local except for group norms, (B, 3, H, W) -> (B, D, h, w); tiles pass through them."""
        ...

    def global_features(self, cells: Tensor) -> Tensor:
        """Layers in which a cell may depend on all cells, -> (B, dim, h, w)."""
        ...


@runtime_checkable
class TiledDecoding(Protocol):
    """A decoder with `features = local_features(global_features)`; tiles of others pass through all layers."""

    last_layer: nn.Module

    def global_features(self, latents: Tensor) -> Tensor:
        """(B, dim, h, w) -> (B, D, h, w): the layers in which a cell may depend on all cells."""
        ...

    def local_features(self, cells: Tensor) -> Tensor:
        """The other layers, local except for group norms. Tiles pass through them."""
        ...


class Quantizer(Protocol):
    """Latents to indices and back. In eval mode `lookup(q(z).indices)` equals `q(z).latents`.

    One index a cell, in [0, vocab_size), unless it is `Layered`.
    """

    dim: int  # channels of its latents; the tokenizer projects to and from them
    vocab_size: int  # of the largest codebook

    def __call__(self, latents: Tensor) -> Quantized: ...

    def lookup(self, indices: Tensor) -> Tensor: ...  # (B, h, w) -> (B, dim, h, w)


@runtime_checkable
class Layered(Protocol):
    """A quantizer with several codebooks or scales.

    Its `lookup` also takes the first scales, (B, t), or the first codebooks, (B, h, w, k), and returns the latents that
    these alone stand for.
    """

    def layout(self, grid: Size, stride: int | None) -> TokenLayout:
        """The layout of the tokens of latents (B, dim, *grid)."""
        ...


@runtime_checkable
class Updates(Protocol):
    """A quantizer with state that no gradient moves, such as an EMA codebook."""

    def update(self) -> dict[str, Tensor]:
        """Advance the state once after every optimizer step that was taken. Returns scalars for the log."""
        ...


class Loss(Protocol):
    """A distance between reconstructions and images."""

    weight: float

    def __call__(self, reconstructions: Tensor, images: Tensor) -> Tensor: ...  # -> ()


@runtime_checkable
class LimitedChannels(Protocol):
    """A loss that compares images of some numbers of channels alone; a member of the class."""

    channels: Sequence[int]


@runtime_checkable
class ExpectsLogits(Protocol):
    """A loss whose reconstructions are logits of the classes of a label map; a member of the class."""

    expects_logits: bool


class Discriminator(Protocol):
    """Images to logits of being real, of any shape led by B. Wired: in_channels; image_size, (H, W)."""

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
    """A term of the discriminator's loss, an `nn.Module`."""

    weight: float

    def __call__(self, output: DiscriminatorOutput) -> Tensor: ...  # -> ()


@runtime_checkable
class LazyRegularizer(Protocol):
    """A regularizer that is computed at some steps only."""

    last_value: Tensor  # () to log at the steps that skip it
