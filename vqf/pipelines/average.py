"""An exponential moving average of a module's weights."""

import copy

import torch
from torch import nn


class Average:
    """Follows a module: θ' ← d θ' + (1 - d) θ, with d rising from 0 so that the start is forgotten soon."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema={decay} is the decay of an average: at least 0 and below 1")
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after a step; buffers (a codebook of moving averages, say) are copied."""
        decay = min(self.decay, (step + 1) / (step + 10))
        for average, now in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(now.detach(), 1 - decay)
        for kept, current in zip(self.module.buffers(), module.buffers(), strict=True):
            kept.copy_(current)
