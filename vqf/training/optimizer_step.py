"""What one optimizer moves, and that it only moves by numbers."""

import math
from collections.abc import Iterable, Mapping

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from vqf.distributed import comm
from vqf.distributed.fsdp import norm_of
from vqf.errors import UserError


class Player:
    """Modules that one optimizer moves.

    With guard.nonfinite=skip a player moves as a whole or not at all: a step on numbers that are not finite changes
    neither weights nor optimizer, and what the forward passes left in buffers (codebook averages, batch norm, windows
    of use) is put back. To decide it, the host waits for the device once a step; otherwise it does not.

    Attributes:
        moved: Whether the step that has begun last was taken.
    """

    def __init__(self, optimizer: Optimizer, modules: Iterable[nn.Module], config: DictConfig) -> None:
        self.optimizer, self.modules = optimizer, list(modules)
        self.clip = math.inf if config.clip is None else config.clip
        self.skips = config.guard.nonfinite == "skip"
        self.moved = True
        self.before: list[dict[str, Tensor]] = []

    def begin(self) -> None:
        """Begin a step: remember what forward passes may change."""
        self.moved = True
        if self.skips:
            self.before = [{name: each.clone() for name, each in part.named_buffers()} for part in self.modules]

    def move(self, values: Mapping[str, Tensor]) -> Tensor:
        """Clip the gradients if asked to, take the step, forget them; returns their norm before clipping.

        Args:
            values: Scalars of this step, that must be finite for it to be taken where steps are skipped.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = norm_of(nn.utils.clip_grad_norm_(parameters, self.clip))
        if self.skips:
            self.moved = not comm.any_of(not _finite([norm, *values.values()]))
        if self.moved:
            self.optimizer.step()
        else:
            self._put_back()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _put_back(self) -> None:
        for part, buffers in zip(self.modules, self.before, strict=True):
            part.load_state_dict(buffers, strict=False)  # not copy_: a module may have a word to say about it


def _finite(values: Iterable[Tensor]) -> bool:
    return bool(torch.stack([value.detach().float().reshape(()) for value in values]).isfinite().all())


class Accumulated:
    """Sums what is logged over micro-batches, on the device: reading a number would wait for it."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Add values, of which this micro-batch is a share."""
        for key, value in values.items():
            self.values[key] = self.values.get(key, 0) + value.detach() * share


def check_accumulate(config: DictConfig) -> None:
    """Refuse micro-batches that are not equal."""
    if config.batch_size % config.accumulate:
        raise UserError(f"accumulate={config.accumulate} must divide batch_size={config.batch_size}")


def describe(what: str, module: nn.Module) -> str:
    """Say how large a model is."""
    return f"{what}: {sum(parameter.numel() for parameter in module.parameters()):,} parameters"
