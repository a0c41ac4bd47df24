"""Where and in which precision the arithmetic happens, and the seeds of its noise."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vqf.errors import UserError, unknown
from vqf.randomness import mix

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ENGINES = ("auto", "single")

C = TypeVar("C")


@dataclass(frozen=True)
class Engine:
    """One device and one precision."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[None]:
        """Run what follows in the engine's precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def place(self, component: C) -> C:
        """Move a module to the device, its convolutions' weights in the order that is fastest there.

        A component that is no module has nothing to move.
        """
        if isinstance(component, nn.Module):
            component.to(self.device).to(memory_format=torch.channels_last)
        return component


def make_engine(config: DictConfig) -> Engine:
    """Read device, precision and engine of a config.

    Raises:
        UserError: If a word is unknown or the device is not there.
    """
    if config.engine not in ENGINES:
        raise UserError(f"engine={config.engine}: {unknown('engine', config.engine, ENGINES)}")
    if config.precision not in PRECISIONS:
        raise UserError(f"precision={config.precision}: {unknown('precision', config.precision, PRECISIONS)}")
    return Engine(_device(str(config.device)), PRECISIONS[config.precision])


def widen(tensor: Tensor) -> Tensor:
    """Return at least float32: losses and norms are not taken in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def seed_everything(*parts: int | str) -> None:
    """Seed the noise of what follows as a pure function of `parts`, so that no random state needs saving."""
    torch.manual_seed(mix(*parts))


def _device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name}: {reason}; device=auto takes what is there, device=cpu always works") from error
    return device
