"""The second player of stage 1: the discriminator, what it plays for, and whether it can play at all."""

from collections.abc import Callable, Mapping

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vqf.config.access import group_nodes, image_size
from vqf.distributed import comm
from vqf.errors import UserError
from vqf.protocols import Adversary, Discriminator, Regularizer
from vqf.registry import build
from vqf.terminal import log


class GANModule(nn.Module):
    """The discriminator, what it plays for, and what holds it back."""

    def __init__(
        self, discriminator: Discriminator, adversary: Adversary, regularizers: Mapping[str, Regularizer]
    ) -> None:
        super().__init__()
        self.discriminator, self.adversary = discriminator, adversary
        self.regularizers = nn.ModuleDict(dict(regularizers))  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Judge images (B, 3, H, W)."""
        return self.discriminator(images)

    def score_pair(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Judge images and their reconstructions, one after the other."""
        return self(images), self(reconstructions)


class no_param_grad:  # noqa: N801
    """Let gradients pass through a module without reaching its parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *exception: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)


@torch.no_grad()
def check_discriminator_input(gan: GANModule, config: DictConfig, channels: int) -> None:
    """Let a discriminator judge blank images, since its own turn may come after hours.

    Raises:
        UserError: If it cannot, with what to change.
    """
    count = config.batch_size // config.accumulate // comm.world_size()
    before = {name: each.clone() for name, each in gan.named_buffers()}
    weight = next(gan.parameters())
    images = weight.new_zeros(min(count, 2), channels, *image_size(config))
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        try:
            for mode in (False, True):  # sizes first: batch norm, too, complains of maps that are too small
                gan.train(mode)
                gan(images)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise UserError(_discriminator_input_error(config, count, error)) from error
    for name, each in gan.named_buffers():
        each.copy_(before[name])


def _discriminator_input_error(config: DictConfig, count: int, error: Exception) -> str:
    height, width = image_size(config)
    words = f"model.discriminator: cannot judge {count} images of {height} x {width} px at once"
    if "more than 1 value per channel" in str(error):
        return f"{words}: its batch norm needs several values; raise batch_size, or set model.discriminator.norm=group"
    layers = config.model.discriminator.get("layers")
    fewer = "another model/discriminator" if layers is None else f"model.discriminator.layers below {layers}"
    return f"{words} ({str(error).splitlines()[0]}): choose {fewer}, or a larger image_size"


def warn_never_active(gan: GANModule, steps: int) -> None:
    """Warn of a discriminator that a run of so many steps never hears."""
    adversary = gan.adversary
    if adversary.start_step >= steps:
        words = f"the game begins at step {adversary.start_step + 1}, so the discriminator is never trained"
    elif adversary.weight_at(steps - 1) == 0:
        words = f"the discriminator learns from step {adversary.start_step + 1} on, but its verdict never counts"
    else:
        return
    log.warning("steps=%d: %s; lower model.adversary.start and warmup, or give shares below 1", steps, words)


def build_gan(config: DictConfig, channels: int = 3) -> GANModule | None:
    """Build the second player that a config chooses, if it does."""
    model = config.model
    if model.get("discriminator") is None:
        return None
    discriminator = build("discriminator", model.discriminator, in_channels=channels)
    adversary = build("adversary", model.adversary, steps=config.steps)
    regularizers = {name: build("regularizer", node) for name, node in group_nodes(model, "regularizer").items()}
    return GANModule(discriminator, adversary, regularizers)


def gan_start(config: DictConfig) -> Callable[[int], int] | None:
    """Return what says, given the steps of a run, at which of them the second player joins; None if none does."""
    adversary = config.model.get("adversary")
    return None if adversary is None else lambda steps: build("adversary", adversary, steps=steps).start_step
