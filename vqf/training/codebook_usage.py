"""How much of a codebook training still uses: a batch is too short a look, an evaluation too rare."""

import torch
from torch import Tensor, nn

from vqf.distributed import comm

WINDOW = 100  # steps


class CodebookUsage(nn.Module):
    """Counts for every code the steps since it was last chosen.

    Buffers of one number a code, and one of steps, so that they are kept in checkpoints and a resumed run reports as if
    it had not stopped.
    """

    age: Tensor
    steps: Tensor

    def __init__(self, vocab_size: int, window: int = WINDOW) -> None:
        super().__init__()
        self.window, self.latents = window, 0
        self.register_buffer("age", torch.full((vocab_size,), window))
        self.register_buffer("steps", torch.tensor(0))

    def update(self, indices: Tensor) -> None:
        """Take in the indices of a micro-batch."""
        self.age[indices.flatten()] = 0
        self.latents += indices.numel()

    def end_step(self) -> dict[str, Tensor]:
        """End a step.

        Returns:
            usage: The share of codes used within the window.
            dead_codes: How many were not.
            usage_vs_chance: `usage`, by the share that as many latents would use if they fell on the codes by chance. A
                codebook that dies is far below 1, however few latents there are.
        """
        self.age.copy_(comm.all_reduce_min(self.age))  # chosen in any process
        fresh = self.age < self.window
        self.age += 1
        self.steps += 1
        seen, self.latents = self.latents * comm.world_size(), 0
        latents = self.steps.clamp(max=self.window).to(torch.float32) * seen
        chance = -torch.expm1(-latents / len(self.age))  # 1 - (1 - 1/V)^n, but for a rounding
        usage = fresh.to(torch.float32).mean()
        return {"usage": usage, "dead_codes": (~fresh).sum(), "usage_vs_chance": usage / chance}
