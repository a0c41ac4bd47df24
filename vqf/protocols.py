"""What each kind of component promises. A plugin inherits nothing: it only has to fit.

Shapes, everywhere in vqf:

* images are float tensors (B, 3, H, W) in [-1, 1];
* latents are (B, D, h, w), with h = H / stride and w = W / stride;
* indices are int64 (B, h, w), or (B, h, w, K) for K codebooks, in [0, vocab_size);
* tokens are int64 (B, N), the indices row by row;
* a prefix is int64 (B, M), the tokens of a condition, in a vocabulary of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Size = tuple[int, int]


@dataclass
class Sample:
    """One picture of a data source."""

    image: Tensor  # (3, H, W) float in [-1, 1]
    label: int | None = None
    mask: Tensor | None = None  # (1, H, W) float in [0, 1]: how much of a pixel is drawn, where a source knows


@dataclass
class Batch:
    """Samples side by side. A stage or conditioner reads the fields it needs."""

    images: Tensor | None = None  # (B, 3, H, W)
    labels: Tensor | None = None  # (B,) int64
    masks: Tensor | None = None  # (B, 1, H, W)
    tokens: Tensor | None = None  # (B, N), where stage 2 trains on cached tokens

    @classmethod
    def collate(cls, samples: Sequence[Sample]) -> "Batch":
        """Stack samples; a field that the first of them lacks is left out."""
        first = samples[0]
        return cls(
            images=torch.stack([sample.image for sample in samples]),
            labels=None if first.label is None else torch.tensor([sample.label for sample in samples]),
            masks=None if first.mask is None else torch.stack([_present(sample.mask) for sample in samples]),
        )

    def __len__(self) -> int:
        return next(len(value) for value in self._present().values())

    def to(self, device: torch.device | str) -> "Batch":
        """Move every field to a device."""
        return replace(self, **{key: value.to(device, non_blocking=True) for key, value in self._present().items()})

    def chunk(self, parts: int) -> list["Batch"]:
        """Cut the batch into equal micro-batches."""
        pieces = {key: value.chunk(parts) for key, value in self._present().items()}
        return [replace(self, **{key: value[i] for key, value in pieces.items()}) for i in range(parts)]

    def _present(self) -> dict[str, Tensor]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {key: value for key, value in values.items() if value is not None}


@dataclass
class Quantized:
    """What a quantizer makes of latents."""

    latents: Tensor  # (B, D, h, w), gradients pass straight through
    indices: Tensor  # (B, h, w) int64 in [0, vocab_size)
    loss: Tensor  # () codebook and commitment terms, 0 where there are none
    stats: Mapping[str, Tensor] = field(default_factory=dict)  # detached scalars for the log


@dataclass
class Reconstruction:
    """What a metric looks at: held-out pictures, what the tokenizer made of them, and through which codes."""

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
    """Latents to images: `last_layer(features(latents))`. Wired: dim, out_channels, image_size."""

    stride: int
    last_layer: nn.Module  # a plain convolution or linear layer, where the adaptive weight compares gradients

    def features(self, latents: Tensor) -> Tensor: ...  # what `last_layer` is applied to

    def __call__(self, latents: Tensor) -> Tensor: ...  # (B, dim, h, w) -> (B, 3, H, W)


class Quantizer(Protocol):
    """Latents to codes. In eval mode `lookup(q(z).indices)` equals `q(z).latents`."""

    dim: int  # channels it quantizes; the tokenizer projects to and from it
    vocab_size: int

    def __call__(self, latents: Tensor) -> Quantized: ...

    def lookup(self, indices: Tensor) -> Tensor: ...  # (B, h, w) -> (B, dim, h, w)


class Loss(Protocol):
    """A distance between reconstructions and images."""

    weight: float

    def __call__(self, reconstructions: Tensor, images: Tensor) -> Tensor: ...  # -> ()


class Discriminator(Protocol):
    """Images to logits of being real, of any shape led by B. Wired: in_channels."""

    def __call__(self, images: Tensor) -> Tensor: ...


class Adversary(Protocol):
    """The GAN objective: what each player minimises, from which step, and how much it weighs. Wired: steps."""

    start: int  # the first step at which the discriminator learns
    second_forward: bool  # whether it judges what the tokenizer draws after its own update

    def generator_loss(self, fake: Tensor) -> Tensor: ...  # logits -> ()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor: ...  # logits -> ()

    def weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """Weigh the generator's loss from both gradients at the decoder's last layer. -> ()."""
        ...

    def ramp(self, step: int) -> float: ...  # share in [0, 1] of its verdict that counts at a step; 0: not asked


@dataclass
class Judged:
    """What a discriminator made of a batch."""

    discriminator: nn.Module
    images: Tensor  # (B, 3, H, W)
    real: Tensor  # logits of the images
    fake: Tensor  # logits of their reconstructions
    step: int  # counted from the start of the run


class Regularizer(Protocol):
    """A term that the discriminator minimises beside the adversary's loss."""

    weight: float

    def __call__(self, judged: Judged) -> Tensor: ...  # -> ()


class Conditioner(Protocol):
    """What stage 2 is told about a picture, as tokens in front of it. Wired: classes."""

    vocab_size: int
    length: int  # M

    def __call__(self, batch: Batch) -> Tensor: ...  # -> (B, M) int64


class Prior(Protocol):
    """A distribution over token sequences. Wired: vocab_size, length, grid, prefix_vocab, prefix_length."""

    vocab_size: int

    def __call__(self, tokens: Tensor, prefix: Tensor) -> Tensor: ...  # (B, N), (B, M) -> logits (B, N, V)

    def loss(self, tokens: Tensor, prefix: Tensor) -> Tensor: ...  # -> () nats per token, differentiable


@runtime_checkable
class Autoregressive(Protocol):
    """A prior that can also be fed one token at a time, remembering keys and values."""

    def begin(self, prefix: Tensor) -> tuple[Tensor, Any]: ...  # (B, M) -> logits (B, V) of token 0, a cache

    def advance(self, token: Tensor, cache: Any) -> Tensor: ...  # (B,), cache -> logits (B, V) of the next token


class Sampler(Protocol):
    """Draws tokens from a prior."""

    def __call__(self, prior: Any, prefix: Tensor, grid: Size, *, seed: int, first: int = 0) -> Tensor:
        """Draw (B, h * w) tokens.

        Sample i of the batch depends on `seed` and `first + i` alone, not on the size of the batch.

        A sampler whose signature has one of these keywords is given it, too: `known`, (B, h * w) tokens to keep,
        -1 where one is to be drawn; `null_prefix`, (B, M), what the conditioner's method `null(batch)` says in place
        of a condition, None where it has none; `window`, the grid that the prior was trained on.
        """
        ...


class Split(Protocol):
    """One part of a data source. `item` is a pure function of the source's seed, epoch and index."""

    fingerprint: str  # changes when the pictures do

    def __len__(self) -> int: ...

    def item(self, epoch: int, index: int) -> Sample: ...


class Data(Protocol):
    """A source of pictures. Wired: image_size, seed."""

    classes: Sequence[str]  # names of the labels; empty where there are none

    def split(self, name: str) -> Split: ...  # "train" or "validation"


class Metric(Protocol):
    """A number over held-out pictures. Wired: vocab_size, device."""

    def update(self, batch: Reconstruction) -> None: ...

    def compute(self) -> dict[str, float]: ...


class Logger(Protocol):
    """Where numbers and pictures of a run go. Wired: run_dir, config."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def images(self, step: int, name: str, images: Tensor) -> None: ...  # (B, 3, H, W), a grid of them

    def close(self) -> None: ...


class Pipeline(Protocol):
    """One thing that `python -m vqf.run` can do. Wired: config, run_dir."""

    def run(self) -> float | None: ...  # what a sweeper minimises


def pair(size: int | Sequence[int]) -> Size:
    """Read an image size given as one number or as height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def share_of(value: float, steps: int) -> int:
    """Read a number of steps, or below 1 a share of the run."""
    return round(value * steps) if 0 < value < 1 else int(value)


def _present(value: Tensor | None) -> Tensor:
    assert value is not None, "every sample of a split has the same fields"
    return value
