"""Exponential moving average (EMA) of a module's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Moving average θ' ← d θ' + (1 - d) θ of the parameters θ of a module, or of their shards.

    The decay rises with the step: d = min(decay, (1 + step) / (10 + step)).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema={decay} is the decay of an average: at least 0 and below 1")
        self.decay = decay
        self.module = module
        # A tied weight has several names in the state dict, and one average.
        parameters = dict(module.named_parameters(remove_duplicate=False))
        copies = {id(parameter): parameter.detach().clone() for parameter in parameters.values()}
        self.shadow_params: dict[str, Tensor] = {name: copies[id(param)] for name, param in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after a step, counted from 0."""
        decay = min(self.decay, (step + 1) / (step + 10))
        parameters = dict(self.module.named_parameters())
        shadows = [self.shadow_params[name] for name in parameters]
        torch._foreach_lerp_(shadows, list(parameters.values()), 1 - decay)  # a few kernels instead of one per tensor

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Put the averages into the module for a while; its buffers stay."""
        trained = {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}
        self._copy_to_module(self.shadow_params)
        try:
            yield
        finally:
            self._copy_to_module(trained)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the module's state dict with averages in place of parameters."""
        return {**self.module.state_dict(), **self.shadow_params}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the averages.

        Raises:
            KeyError: If one is missing.
        """
        for name, tensor in self.shadow_params.items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def _copy_to_module(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.copy_(tensors[name])
