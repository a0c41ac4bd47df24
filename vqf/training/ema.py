"""An exponential moving average of a module's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Follows a module: θ' ← d θ' + (1 - d) θ, with d rising from 0 so that the start is forgotten soon.

    Holds tensors, not a second module: where the weights are shards, so are their averages.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema={decay} is the decay of an average: at least 0 and below 1")
        self.decay = decay
        self.module = module
        parameters = dict(module.named_parameters(remove_duplicate=False))  # of tied weights, every name
        copies = {id(each): each.detach().clone() for each in parameters.values()}
        self.shadow_params: dict[str, Tensor] = {name: copies[id(each)] for name, each in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (step + 1) / (step + 10))
        now = dict(self.module.named_parameters())
        torch._foreach_lerp_(
            [self.shadow_params[name] for name in now], list(now.values()), 1 - decay
        )  # in a few kernels

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Let the module have the averages for its weights; its buffers (a codebook, say) are not averaged."""
        own = {name: each.detach().clone() for name, each in self.module.named_parameters()}
        self._copy_to_module(self.shadow_params)
        try:
            yield
        finally:
            self._copy_to_module(own)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the module with the averages in it."""
        return {**self.module.state_dict(), **self.shadow_params}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            KeyError: If it is of another module.
        """
        for name, tensor in self.shadow_params.items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def _copy_to_module(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.copy_(tensors[name])
