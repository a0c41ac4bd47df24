"""What one optimizer moves, and that it only moves by numbers."""

import math
from collections.abc import Iterable, Mapping

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from vqf.distributed import comm
from vqf.distributed.fsdp import full_norm
from vqf.errors import UserError


class OptimizerStep:
    """Modules that one optimizer moves.

    With nonfinite.action=skip a player moves as a whole or not at all: a step on numbers that are not finite changes
    neither weights nor optimizer, and what the forward passes left in buffers (codebook averages, batch norm, windows
    of use) is put back. To decide it, the host waits for the device once a step; otherwise it does not.

    Attributes:
        stepped: Whether the step that has begun last was taken.
    """

    def __init__(self, optimizer: Optimizer, modules: Iterable[nn.Module], config: DictConfig) -> None:
        self.optimizer, self.modules = optimizer, list(modules)
        self.clip = math.inf if config.clip is None else config.clip
        self.skip_nonfinite = config.nonfinite.action == "skip"
        self.stepped = True
        self.saved_buffers: list[dict[str, Tensor]] = []

    def start(self) -> None:
        """Begin a step: remember what forward passes may change."""
        self.stepped = True
        if self.skip_nonfinite:
            self.saved_buffers = [{name: each.clone() for name, each in part.named_buffers()} for part in self.modules]

    def step(self, scalars: Mapping[str, Tensor]) -> Tensor:
        """Clip the gradients if asked to, take the step, forget them; returns their norm before clipping.

        Args:
            scalars: Scalars of this step, that must be finite for it to be taken where steps are skipped.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = full_norm(nn.utils.clip_grad_norm_(parameters, self.clip))
        if self.skip_nonfinite:
            self.stepped = not comm.any_rank(not _all_finite([norm, *scalars.values()]))
        if self.stepped:
            self.optimizer.step()
        else:
            self._restore_buffers()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _restore_buffers(self) -> None:
        for part, buffers in zip(self.modules, self.saved_buffers, strict=True):
            part.load_state_dict(buffers, strict=False)  # not copy_: a module may have a word to say about it


def _all_finite(values: Iterable[Tensor]) -> bool:
    return bool(torch.stack([value.detach().float().reshape(()) for value in values]).isfinite().all())


class ScalarAccumulator:
    """Sums what is logged over micro-batches, on the device: reading a number would wait for it."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add values, of which this micro-batch is a share."""
        for key, value in values.items():
            self.values[key] = self.values.get(key, 0) + value.detach() * weight


def check_accumulate(config: DictConfig) -> None:
    """Refuse micro-batches that are not equal."""
    if config.batch_size % config.accumulate:
        raise UserError(f"accumulate={config.accumulate} must divide batch_size={config.batch_size}")


def describe_model(what: str, module: nn.Module) -> str:
    """Say how large a model is."""
    return f"{what}: {sum(parameter.numel() for parameter in module.parameters()):,} parameters"
