"""Codebook usage over the last training steps."""

import torch
from torch import Tensor, nn

from vqf.distributed import comm

WINDOW = 100  # steps


class CodebookUsage(nn.Module):
    """Counts, for every code, the steps since it was last used.

    Args:
        vocab_size: Number of codes, V.
        window: A code unused for so many steps is dead.
    """

    age: Tensor  # (V,) int64, steps since last use
    steps: Tensor  # () int64, steps counted so far

    def __init__(self, vocab_size: int, window: int = WINDOW) -> None:
        super().__init__()
        self.window, self.latents = window, 0
        self.register_buffer("age", torch.full((vocab_size,), window))
        self.register_buffer("steps", torch.tensor(0))

    def update(self, indices: Tensor) -> None:
        """Count the indices (B, ...) of a micro-batch."""
        self.age[indices.flatten()] = 0
        self.latents += indices.numel()

    def end_step(self) -> dict[str, Tensor]:
        """Return the usage statistics over all ranks.

        Returns:
            usage: Share of codes used within the window.
            dead_codes: Number of the others.
            usage_vs_chance: `usage` divided by that of uniformly random codes, 1 - (1 - 1/V)^n for n latents in the
                window; below 0.2 means collapse.
        """
        self.age.copy_(comm.all_reduce_min(self.age))  # used on any rank
        used = self.age < self.window
        self.age += 1
        self.steps += 1
        latents_per_step, self.latents = self.latents * comm.world_size(), 0
        latents = self.steps.clamp(max=self.window).to(torch.float32) * latents_per_step
        chance = -torch.expm1(-latents / len(self.age))  # 1 - exp(-n/V), close to 1 - (1 - 1/V)^n
        usage = used.to(torch.float32).mean()
        return {"usage": usage, "dead_codes": (~used).sum(), "usage_vs_chance": usage / chance}
