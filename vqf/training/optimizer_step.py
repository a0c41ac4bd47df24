"""One optimizer step: clip, skip if not finite, step, zero_grad."""

import math
from collections.abc import Iterable, Mapping

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from vqf.distributed import comm
from vqf.errors import UserError


class OptimizerStep:
    """One optimizer with the modules that it trains.

    With nonfinite.action=skip a non-finite step changes no weights, optimizer state or buffers; the host then waits for
    the device once a step.

    Attributes:
        stepped: Whether the last step was not skipped.
    """

    def __init__(self, optimizer: Optimizer, modules: Iterable[nn.Module], config: DictConfig) -> None:
        self.optimizer, self.modules = optimizer, list(modules)
        self.clip = math.inf if config.clip is None else config.clip
        self.skip_nonfinite = config.nonfinite.action == "skip"
        self.stepped = True
        self.saved_buffers: list[dict[str, Tensor]] = []

    def start(self) -> None:
        self.stepped = True
        if self.skip_nonfinite:
            self.saved_buffers = [
                {name: buffer.clone() for name, buffer in module.named_buffers()} for module in self.modules
            ]

    def step(self, scalars: Mapping[str, Tensor]) -> Tensor:
        """Clip gradients, step, and zero gradients; returns the gradient norm () before clipping.

        Args:
            scalars: Losses of this step; non-finite ones skip it.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = comm.full_tensor(nn.utils.clip_grad_norm_(parameters, self.clip))
        if self.skip_nonfinite:
            self.stepped = not comm.any_rank(not _all_finite([norm, *scalars.values()]))
        if self.stepped:
            self.optimizer.step()
        else:
            self._restore_buffers()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _restore_buffers(self) -> None:
        for module, buffers in zip(self.modules, self.saved_buffers, strict=True):
            module.load_state_dict(buffers, strict=False)  # not copy_: a module may derive other state when it loads


def _all_finite(values: Iterable[Tensor]) -> bool:
    return bool(torch.stack([value.detach().float().reshape(()) for value in values]).isfinite().all())


class ScalarAccumulator:
    """Sums scalars over micro-batches on the device."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weight: float = 1.0) -> None:
        for key, value in values.items():
            self.values[key] = self.values.get(key, 0) + value.detach() * weight


def check_accumulate(config: DictConfig) -> None:
    """Refuse micro-batches of different sizes.

    Raises:
        UserError: If `accumulate` does not divide `batch_size`.
    """
    if config.batch_size % config.accumulate:
        raise UserError(f"accumulate={config.accumulate} must divide batch_size={config.batch_size}")


def describe_model(name: str, module: nn.Module) -> str:
    """Return a line with a model's parameter count."""
    return f"{name}: {sum(parameter.numel() for parameter in module.parameters()):,} parameters"
