"""How much of a codebook training still uses: a batch is too short a look, an evaluation too rare."""

import torch
from torch import Tensor, nn

from vqf import ranks

WINDOW = 100  # steps


class UsageWindow(nn.Module):
    """Counts for every code the steps since it was last chosen.

    A buffer of one number a code, so that it is kept in checkpoints and a resumed run reports as if it had not stopped.
    """

    age: Tensor

    def __init__(self, vocab_size: int, window: int = WINDOW) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("age", torch.full((vocab_size,), window))

    def see(self, indices: Tensor) -> None:
        """Take in the indices of a micro-batch."""
        self.age[indices.flatten()] = 0

    def tick(self) -> dict[str, Tensor]:
        """End a step; returns the share of codes used within the window, and how many were not."""
        self.age.copy_(ranks.least(self.age))  # chosen in any process
        fresh = self.age < self.window
        self.age += 1
        return {"usage": fresh.float().mean(), "dead": (~fresh).sum()}
