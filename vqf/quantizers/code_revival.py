"""Codebooks that live: codes begin where latents are, and those that nobody uses come back among them.

Jukebox, https://arxiv.org/abs/2005.00341, section 3.1: codes start at latents, and one whose mean usage falls below a
threshold is moved to a random latent of the batch.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqf.distributed import comm
from vqf.quantizers.codebook import index_counts, nearest

KMEANS_ITERATIONS = 10
USAGE_DECAY = 0.99  # of the mean usage

CodebookInit = Literal["latents", "kmeans"]


class StepStatistics:
    """What the forwards of one optimizer step have seen: sums over its micro-batches, and the latents of the last.

    It is empty between two steps, and so no buffer.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget."""
        self.sums: list[Tensor] = []
        self.latents: Tensor | None = None

    def update(self, latents: Tensor, *sums: Tensor) -> None:
        """Take in a micro-batch: its latents (N, D), and what is to be summed."""
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else list(sums)
        self.latents = latents

    def pop(self) -> tuple[list[Tensor], Tensor] | None:
        """Return the sums over all processes, and this one's latents, and forget them; None if there was nothing."""
        sums, latents = self.sums, self.latents
        self.clear()
        return None if latents is None else ([comm.all_reduce_sum(each) for each in sums], latents)


class CodeRevival(nn.Module):
    """Moves codes that are learned by gradient, after an optimizer step.

    What Adam remembers of a code that is moved stays: the code had no gradient for long, so that it has faded.

    Args:
        codebook_size: Number of codes.
        revive: A code that is chosen less often a step than this, by a moving average, is moved to a random latent.
        init: Where codes are moved after the first step; None leaves them.
        project: What brings the means of k-means to where codes lie.
    """

    N: Tensor
    initialized: Tensor

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
        self.initialized_on_host = init is None  # spares the host from asking the device, once it has said yes
        self.register_load_state_dict_post_hook(reset_after_load)

    def observe(self, latents: Tensor, chosen: Tensor) -> None:
        """Take in the latents (N, D) of a forward and which codes (N,) they chose."""
        self.step_stats.update(latents, index_counts(chosen, len(self.N)).to(self.N.dtype))

    @torch.no_grad()
    def update(self, codebook: Tensor) -> dict[str, Tensor]:
        """End an optimizer step: move what has to be moved; returns how many codes were revived."""
        if (seen := self.step_stats.pop()) is None:
            return {}
        (n,), latents = seen
        self.N.lerp_(n, 1 - USAGE_DECAY)
        dead = (self.N < self.revive) & self.initialized
        moved = dead | ~self.initialized
        # Drawn whether needed or not: to know, the host would have to wait for the device.
        codes = sample_latents(latents, len(self.N))
        if not self.initialized_on_host:
            codes = self._initial_codes(latents, codes)
        comm.copy_full_(codebook, torch.where(moved[:, None], codes.to(codebook.dtype), comm.full_tensor(codebook)))
        self.N.masked_fill_(dead, max(1 - USAGE_DECAY, self.revive))  # with less it would be dead before anyone saw it
        return {"revived": dead.sum()}

    def _initial_codes(self, latents: Tensor, codes: Tensor) -> Tensor:
        """Return where the codes start, unless they have; from now on they have."""
        if self.init == "kmeans" and not self.initialized:
            codes = kmeans(latents, codes, self.project)
        self.initialized.fill_(True)
        self.initialized_on_host = True
        return codes


def make_revival(
    codebook_size: int, revive: float, init: CodebookInit | None, project: Callable[[Tensor], Tensor] | None = None
) -> CodeRevival | None:
    """Build what moves codes, if anything is to.

    Raises:
        ValueError: If `revive` is below 0.
    """
    if revive < 0:
        raise ValueError(f"revive={revive}: how often a step a living code is chosen; 0 never revives")
    if not revive and init is None:
        return None
    return CodeRevival(codebook_size, revive, init, *([project] if project else []))


def reset_after_load(module: Any, incompatible_keys: Any) -> None:
    """After loading a state: `initialized` may be anything, and what a step that was given up has seen does not
    count."""
    module.initialized_on_host = False
    module.step_stats.clear()


def sample_latents(latents: Tensor, count: int) -> Tensor:
    """Draw `count_and_sum` latents of all processes' (N, D), the same in each, with a little noise where they
    repeat."""
    several = comm.world_size() * len(latents)
    if several >= count:
        return _gather_rows(latents, torch.randperm(several, device=latents.device)[:count])
    drawn = _gather_rows(latents, torch.randint(several, (count,), device=latents.device))
    return drawn + 0.01 * drawn.std() * comm.broadcast(torch.randn_like(drawn))


def kmeans(latents: Tensor, codes: Tensor, project: Callable[[Tensor], Tensor] = lambda codes: codes) -> Tensor:
    """Improve codes (V, D) by Lloyd's algorithm on all processes' latents (N, D); one that nobody chooses stays."""
    for _ in range(KMEANS_ITERATIONS):
        n, total = (comm.all_reduce_sum(each) for each in count_and_sum(latents, nearest(latents, codes), len(codes)))
        codes = project(torch.where(n[:, None] > 0, total / n.clamp(min=1)[:, None], codes))
    return codes


def count_and_sum(latents: Tensor, chosen: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return how often each code was chosen (V,), and the sum of its latents (V, D)."""
    total = latents.new_zeros(size, latents.shape[1]).index_add_(0, chosen, latents)
    return index_counts(chosen, size).to(latents.dtype), total


def _gather_rows(latents: Tensor, rows: Tensor) -> Tensor:
    """Return rows of the latents of all processes behind each other, those that the first one has drawn."""
    rows = comm.broadcast(rows)
    mine = (rows // len(latents) == comm.rank())[:, None]
    return comm.all_reduce_sum(torch.where(mine, latents[rows % len(latents)], 0))
