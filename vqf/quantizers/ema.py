"""VQ with a codebook of moving averages, and the revival of codes that nobody uses.

Neural Discrete Representation Learning, https://arxiv.org/abs/1711.00937, appendix A.1, with the Laplace smoothing of
Sonnet's VectorQuantizerEMA. Sonnet starts both averages at 0 and divides them by 1 - γ^t, which is `debias`; by default
they start at N = 1 and m = e, as if every code had been chosen once (so does vector-quantize-pytorch). Revival as in
Jukebox, https://arxiv.org/abs/2005.00341, section 3.1.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqf.protocols import Quantized
from vqf.quantizers.code_revival import (
    CodebookInit,
    StepStatistics,
    count_and_sum,
    kmeans,
    reset_after_load,
    sample_latents,
)
from vqf.quantizers.codebook import check_positive, index_counts, nearest, straight_through, usage_stats
from vqf.registry import register


@register("quantizer", "ema")
class EMAQuantizer(nn.Module):
    """Codes are moving averages of the latents they stand for, https://arxiv.org/abs/1711.00937.

    N_k ← γ N_k + (1-γ) n_k,  m_k ← γ m_k + (1-γ) Σ z,  e_k ← m_k / N_k with N_k smoothed by ε.
    The averages move once an optimizer step, by the latents of all its micro-batches and all processes: `update`.

    Args:
        dim: Channels of a code.
        codebook_size: Number of codes.
        decay: γ.
        beta: Weight of the commitment term |z - sg[e]|².
        epsilon: ε of the Laplace smoothing.
        revive: A code whose N_k falls below this is moved to a random latent of the batch, with the averages
            of a code that was counted there once, and at least this N_k; 0 never revives.
        init: Where codes begin, on the first batch of training: at latents of it, or at the means of a few
            rounds of k-means from there.
        debias: Divide both averages by 1 - γ^t, so that nothing of their start is left in them, as Sonnet does.
            Without revival a code that was never chosen then lies at 0.
    """

    N: Tensor
    m: Tensor
    codebook: Tensor
    initialized: Tensor
    updates: Tensor

    def __init__(
        self,
        *,
        dim: int = 256,
        codebook_size: int = 1024,
        decay: float = 0.99,
        beta: float = 0.25,
        epsilon: float = 1e-5,
        revive: float = 0.03,
        init: CodebookInit = "latents",
        debias: bool = False,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, codebook_size=codebook_size)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        self.dim, self.vocab_size = dim, codebook_size
        self.decay, self.beta, self.epsilon, self.revive = decay, beta, epsilon, revive
        self.init, self.debias = init, debias
        self.register_buffer("codebook", torch.randn(codebook_size, dim))
        self.register_buffer("N", torch.ones(codebook_size))
        self.register_buffer("m", self.codebook.clone())
        self.register_buffer("initialized", torch.tensor(False))
        if debias:
            self.register_buffer("updates", torch.tensor(0))
        self.step_stats = StepStatistics()
        self.initialized_on_host = False  # spares the host from asking the device, once it has said yes
        self.register_load_state_dict_post_hook(reset_after_load)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents (B, dim, h, w); one that gradients are taken of counts for the next `update`."""
        b, _, h, _ = z.shape
        flat = rearrange(z.detach(), "b d h w -> (b h w) d")
        if self.training and not self.initialized_on_host:
            self._init_codebook(flat)
        chosen = nearest(flat, self.codebook)
        indices = rearrange(chosen, "(b h w) -> b h w", b=b, h=h)
        e = self.lookup(indices)
        commitment_loss = F.mse_loss(z, e)
        stats = {
            **usage_stats(index_counts(indices, self.vocab_size), self.training),
            "commitment": commitment_loss.detach(),
        }
        if self.training and torch.is_grad_enabled():
            flat = flat.to(self.m.dtype)
            self.step_stats.update(flat, *count_and_sum(flat, chosen, self.vocab_size))
        return Quantized(straight_through(z, e), indices, self.beta * commitment_loss, stats)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes (B, dim, h, w) of indices (B, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "b h w d -> b d h w")

    @torch.no_grad()
    def update(self) -> dict[str, Tensor]:
        """End an optimizer step: move the averages and the codes; returns how many codes were revived."""
        if (seen := self.step_stats.pop()) is None:
            return {}
        (n, total), latents = seen
        rate = self._ema_rate()
        self.N.lerp_(n, rate)
        self.m.lerp_(total, rate)
        dead = self.N < self.revive
        if self.revive > 0:
            self._revive(latents, dead)
        size = self.N.sum()
        smoothed = (self.N + self.epsilon) / (size + self.vocab_size * self.epsilon) * size
        self.codebook.copy_(self.m / smoothed[:, None])
        return {"revived": dead.sum()}

    @torch.no_grad()
    def _init_codebook(self, flat: Tensor) -> None:
        """Begin with codes at latents of the first batch: random ones far away would never be chosen."""
        if not self.initialized:
            flat = flat.to(self.m.dtype)
            codes = sample_latents(flat, self.vocab_size)
            self.codebook.copy_(kmeans(flat, codes) if self.init == "kmeans" else codes)
            self.m.copy_(self.codebook)
            self.initialized.fill_(True)
        self.initialized_on_host = True

    def _ema_rate(self) -> Tensor:
        """Return how far the averages go this time: 1 - γ, or what makes them a_t / (1 - γ^t) with a_0 = 0."""
        rate = torch.full_like(self.N[0], 1 - self.decay)
        if self.debias:
            self.updates += 1
            rate = rate / (1 - self.decay ** self.updates.to(rate.dtype))
        return rate

    def _revive(self, flat: Tensor, dead: Tensor) -> None:
        fresh = sample_latents(flat, self.vocab_size)
        average = max(1 - self.decay, self.revive)  # with less it would be dead again before anyone saw it
        # The sums move together with the code: a code revived without them falls back at the next update.
        self.N.masked_fill_(dead, average)
        self.m.copy_(torch.where(dead[:, None], fresh * average, self.m))
