"""Initialization and revival of codes by data; the same on all ranks.

Jukebox, https://arxiv.org/abs/2005.00341, section 3.1.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqf.distributed import comm
from vqf.quantizers.codebook import index_counts, nearest

KMEANS_ITERATIONS = 10
USAGE_DECAY = 0.99  # of the moving average of a code's usage

CodebookInit = Literal["latents", "kmeans"]


class StepStatistics:
    """Sums over the forward passes of one optimizer step, and its last latents.

    Empty when checkpoints are written; so they are no buffers.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.sums: list[Tensor] = []
        self.latents: Tensor | None = None

    def update(self, latents: Tensor, *sums: Tensor) -> None:
        """Add the latents (N, D) of a micro-batch, and tensors to sum."""
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else list(sums)
        self.latents = latents

    def pop(self) -> tuple[list[Tensor], Tensor] | None:
        """Return and clear the sums over all ranks and the latents, if any."""
        sums, latents = self.sums, self.latents
        self.clear()
        return None if latents is None else ([comm.all_reduce_sum(total) for total in sums], latents)


class CodeRevival(nn.Module):
    """Initializes and revives a codebook that is trained by gradient.

    Args:
        revive: A code is moved to a random latent if its average occurrences a step are below this; 0 never.
        init: Where all codes are moved after the first step.
        project: Maps k-means centers (V, D) to valid codes.
    """

    N: Tensor  # (V,) moving average of the occurrences of each code a step
    initialized: Tensor  # () bool

    def __init__(
        self,
        codebook_size: int,
        revive: float,
        init: CodebookInit | None,
        project: Callable[[Tensor], Tensor] = lambda codes: codes,
    ) -> None:
        super().__init__()
        self.revive, self.init, self.project = revive, init, project
        self.step_stats = StepStatistics()
        self.register_buffer("N", torch.ones(codebook_size))
        self.register_buffer("initialized", torch.tensor(init is None))
        self.initialized_on_host = init is None  # a copy of `initialized` that needs no sync with the device
        self.register_load_state_dict_post_hook(reset_after_load)

    def observe(self, latents: Tensor, chosen: Tensor) -> None:
        """Add latents (N, D) and their indices (N,)."""
        self.step_stats.update(latents, index_counts(chosen, len(self.N)).to(self.N.dtype))

    @torch.no_grad()
    def update(self, codebook: Tensor) -> dict[str, Tensor]:
        """Move codes (V, D) in place at the end of a step. Returns `revived`, the number of dead ones."""
        if (stats := self.step_stats.pop()) is None:
            return {}
        (n,), latents = stats
        self.N.lerp_(n, 1 - USAGE_DECAY)
        dead = (self.N < self.revive) & self.initialized
        moved = dead | ~self.initialized
        # Sampled at every step: to know whether a code is dead the host would have to wait for the device.
        codes = sample_latents(latents, len(self.N))
        if not self.initialized_on_host:
            codes = self._initial_codes(latents, codes)
        comm.copy_full_(codebook, torch.where(moved[:, None], codes.to(codebook.dtype), comm.full_tensor(codebook)))
        self.N.masked_fill_(dead, max(1 - USAGE_DECAY, self.revive))  # below `revive` it would be dead again at once
        return {"revived": dead.sum()}

    def _initial_codes(self, latents: Tensor, codes: Tensor) -> Tensor:
        if self.init == "kmeans" and not self.initialized:
            codes = kmeans(latents, codes, self.project)
        self.initialized.fill_(True)
        self.initialized_on_host = True
        return codes


def make_revival(
    codebook_size: int, revive: float, init: CodebookInit | None, project: Callable[[Tensor], Tensor] | None = None
) -> CodeRevival | None:
    """Build a `CodeRevival`; None if it would do nothing."""
    if not revive and init is None:
        return None
    return CodeRevival(codebook_size, revive, init, *([project] if project else []))


def reset_after_load(module: Any, incompatible_keys: Any) -> None:
    """Drop what a loaded state dict makes stale."""
    module.initialized_on_host = False
    module.step_stats.clear()


def sample_latents(latents: Tensor, count: int) -> Tensor:
    """Sample `count` latents from those of all ranks (N, D each).

    If there are fewer, latents repeat with a little noise.
    """
    total = comm.world_size() * len(latents)
    if total >= count:
        return _gather_rows(latents, torch.randperm(total, device=latents.device)[:count])
    sampled = _gather_rows(latents, torch.randint(total, (count,), device=latents.device))
    return sampled + 0.01 * sampled.std() * comm.broadcast(torch.randn_like(sampled))


def kmeans(latents: Tensor, codes: Tensor, project: Callable[[Tensor], Tensor] = lambda codes: codes) -> Tensor:
    """Move codes (V, D) by Lloyd's algorithm on the latents of all ranks."""
    for _ in range(KMEANS_ITERATIONS):
        sums = count_and_sum(latents, nearest(latents, codes), len(codes))
        n, total = (comm.all_reduce_sum(each) for each in sums)
        codes = project(torch.where(n[:, None] > 0, total / n.clamp(min=1)[:, None], codes))
    return codes


def count_and_sum(latents: Tensor, chosen: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """n_k (V,), the number of latents of each code, and their sum Σ z (V, D)."""
    total = latents.new_zeros(size, latents.shape[1]).index_add_(0, chosen, latents)
    return index_counts(chosen, size).to(latents.dtype), total


def _gather_rows(latents: Tensor, rows: Tensor) -> Tensor:
    rows = comm.broadcast(rows)
    mine = (rows // len(latents) == comm.rank())[:, None]
    return comm.all_reduce_sum(torch.where(mine, latents[rows % len(latents)], 0))
