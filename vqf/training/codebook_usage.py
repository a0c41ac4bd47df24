"""Codebook usage over the last training steps."""

import torch
from torch import Tensor, nn

from vqf.distributed import comm
from vqf.tokens.layout import MAX_COUNTED, TokenLayout

WINDOW = 100  # steps
HASH_MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio as int64: Fibonacci hashing, Knuth, TAOCP 3, section 6.4
HASH_BITS = MAX_COUNTED.bit_length() - 1


class CodebookUsage(nn.Module):
    """Counts, for every code of every codebook, the steps since it was last used.

    Codes of a codebook larger than `MAX_COUNTED` are counted by a hash, so that memory does not follow its size.

    Args:
        window: A code unused for so many steps is dead.
    """

    age: Tensor  # (sum of the codebooks' sizes,) int64, steps since last use
    steps: Tensor  # () int64, steps counted so far

    def __init__(self, layout: TokenLayout, window: int = WINDOW) -> None:
        super().__init__()
        self.layout, self.window, self.cells = layout, window, 0
        self.hashed = [size > MAX_COUNTED for size in layout.vocab_sizes]
        self.sizes = [min(size, MAX_COUNTED) for size in layout.vocab_sizes]
        self.register_buffer("age", torch.full((sum(self.sizes),), window))
        self.register_buffer("steps", torch.tensor(0))

    def update(self, tokens: Tensor) -> None:
        """Count the tokens (B, T) of a micro-batch."""
        by_codebook = self.layout.by_codebook(tokens)
        for k, age in enumerate(self.age.split(self.sizes)):
            codes = by_codebook[..., k].flatten()
            age[_hash(codes) if self.hashed[k] else codes] = 0
        self.cells += by_codebook[..., 0].numel()

    def end_step(self) -> dict[str, Tensor]:
        """Return the usage statistics over all ranks: the mean of all codebooks, with several also those of each.

        Returns:
            usage: Share of codes used within the window. Not of a codebook counted by a hash.
            dead_codes: Number of the others, of all codebooks.
            usage_vs_chance: `usage` divided by that of uniformly random codes, 1 - (1 - 1/V)^n for n latents in the
                window; below 0.2 means collapse.
        """
        self.age.copy_(comm.all_reduce_min(self.age))  # used on any rank
        cells_per_step, self.cells = self.cells * comm.world_size(), 0
        latents = (self.steps + 1).clamp(max=self.window).to(torch.float32) * cells_per_step
        codebooks = zip(self.age.split(self.sizes), self.hashed, strict=True)
        each = [self._statistics(age, latents, hashed) for age, hashed in codebooks]
        self.age += 1
        self.steps += 1
        if len(each) == 1:
            return each[0]
        summary = {key: _summarize(key, [stats[key] for stats in each if key in stats]) for key in each[0]}
        return summary | {f"{key}/{k}": value for k, stats in enumerate(each) for key, value in stats.items()}

    def _statistics(self, age: Tensor, latents: Tensor, hashed: bool) -> dict[str, Tensor]:
        used = age < self.window
        chance = -torch.expm1(-latents / len(age))  # 1 - exp(-n/V), close to 1 - (1 - 1/V)^n
        usage = used.to(torch.float32).mean()
        if hashed:
            return {"usage_vs_chance": usage / chance}
        return {"usage": usage, "dead_codes": (~used).sum(), "usage_vs_chance": usage / chance}


def _hash(codes: Tensor) -> Tensor:
    return (codes * HASH_MULTIPLIER >> (64 - HASH_BITS)) & (MAX_COUNTED - 1)


def _summarize(key: str, values: list[Tensor]) -> Tensor:
    stacked = torch.stack(values)
    return stacked.sum() if key == "dead_codes" else stacked.to(torch.float32).mean()
