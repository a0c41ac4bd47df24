"""The GAN part of stage 1: discriminator, adversary and regularizers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vqf.batch import Size
from vqf.config.access import group_nodes, image_size
from vqf.distributed import comm
from vqf.errors import UserError
from vqf.protocols import Adversary, Discriminator, Regularizer
from vqf.registry import build
from vqf.terminal import log


class GANModule(nn.Module):
    """A discriminator, its adversary and regularizers."""

    def __init__(
        self, discriminator: Discriminator, adversary: Adversary, regularizers: Mapping[str, Regularizer]
    ) -> None:
        super().__init__()
        self.discriminator, self.adversary = discriminator, adversary
        self.regularizers = nn.ModuleDict({name: cast(nn.Module, each) for name, each in regularizers.items()})

    def forward(self, images: Tensor) -> Tensor:
        """Score images (B, 3, H, W)."""
        return self.discriminator(images)

    def score_pair(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of images and of reconstructions, from separate forwards."""
        return self(images), self(reconstructions)


@contextmanager
def no_param_grad(module: nn.Module) -> Iterator[None]:
    """Let gradients flow through a module, but not to its parameters."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def build_gan(config: DictConfig, channels: int, size: Size) -> GANModule | None:
    """Build the GAN of a config, if it has a discriminator."""
    model = config.model
    if model.get("discriminator") is None:
        return None
    discriminator = build("discriminator", model.discriminator, in_channels=channels, image_size=size)
    adversary = build("adversary", model.adversary, steps=config.steps)
    regularizers = {name: build("regularizer", node) for name, node in group_nodes(model, "regularizer").items()}
    return GANModule(discriminator, adversary, regularizers)


def gan_start(config: DictConfig) -> Callable[[int], int] | None:
    """Return a function from a run's steps to the discriminator's first, if there is one."""
    adversary = config.model.get("adversary")
    return None if adversary is None else lambda steps: build("adversary", adversary, steps=steps).start_step


@torch.no_grad()
def check_discriminator_input(gan: GANModule, config: DictConfig, channels: int) -> None:
    """Run the discriminator on blank images; its state and the RNG's stay.

    Raises:
        UserError: If it fails.
    """
    count = config.batch_size // config.accumulate // comm.world_size()
    buffers = {name: buffer.clone() for name, buffer in gan.named_buffers()}
    weight = next(gan.parameters())
    images = weight.new_zeros(min(count, 2), channels, *image_size(config))
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        try:
            # Eval mode first: in train mode batch norm fails, too, where the feature map has become too small, and
            # its message would hide the reason.
            for mode in (False, True):
                gan.train(mode)
                gan(images)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise UserError(_discriminator_input_error(config, count, error)) from error
    for name, buffer in gan.named_buffers():
        buffer.copy_(buffers[name])


def _discriminator_input_error(config: DictConfig, count: int, error: Exception) -> str:
    height, width = image_size(config)
    problem = f"model.discriminator: cannot process {count} images of {height} x {width} px"
    if "more than 1 value per channel" in str(error):
        hint = "raise batch_size, or set model.discriminator.norm=group"
        return f"{problem}: its batch norm needs several values; {hint}"
    layers = config.model.discriminator.get("layers")
    smaller = "another model/discriminator" if layers is None else f"model.discriminator.layers below {layers}"
    return f"{problem} ({str(error).splitlines()[0]}): choose {smaller}, or a larger image_size"


def warn_never_active(gan: GANModule, steps: int) -> None:
    """Warn if the discriminator is never trained or never reaches the tokenizer."""
    adversary = gan.adversary
    if adversary.start_step >= steps:
        problem = f"the discriminator starts at step {adversary.start_step + 1}, so it is never trained"
    elif adversary.weight_at(steps - 1) == 0:
        problem = f"the discriminator is trained from step {adversary.start_step + 1}, but its loss never counts"
    else:
        return
    log.warning("steps=%d: %s; lower model.adversary.start and warmup, or give shares below 1", steps, problem)
