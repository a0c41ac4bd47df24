"""VQ with an EMA codebook, and revival of dead codes.

Neural Discrete Representation Learning, https://arxiv.org/abs/1711.00937, appendix A.1, with the Laplace smoothing of
Sonnet's VectorQuantizerEMA; by default averages start at N = 1 and m = e. Revival as in Jukebox,
https://arxiv.org/abs/2005.00341.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqf.options.ranges import Dimension, NonNegativeFloat, PositiveFloat, Rate
from vqf.protocols import Quantized
from vqf.quantizers.code_revival import (
    CodebookInit,
    StepStatistics,
    count_and_sum,
    kmeans,
    reset_after_load,
    sample_latents,
)
from vqf.quantizers.codebook import index_counts, nearest, straight_through, usage_stats
from vqf.registry import register


@register("quantizer", "ema")
class EMAQuantizer(nn.Module):
    """Code vectors are moving averages of their latents, https://arxiv.org/abs/1711.00937.

    N_k ← γ N_k + (1-γ) n_k,  m_k ← γ m_k + (1-γ) Σ z,  e_k ← m_k / N_k with N_k smoothed by ε.
    `update` moves the averages once an optimizer step, by the latents of all its micro-batches and all ranks.

    Args:
        dim: Channels of a code vector.
        codebook_size: Number of codes.
        decay: γ.
        beta: Weight of the commitment term |z - sg[e]|².
        epsilon: ε of the Laplace smoothing.
        revive: A code is moved to a random latent of the batch if its N_k is below this; 0 never revives. Its N_k
            becomes 1 - γ, as of a code that occurred once, but at least this.
        init: Initial codes, set in the first forward pass of training: `latents` of its batch, or `kmeans` centers.
        debias: Divide both averages by 1 - γ^t, so that nothing of their initial values is left, as Sonnet does. A code
            that has never occurred is then 0, unless it is revived.
    """

    N: Tensor  # (V,) moving average of n_k, the number of latents of each code a step
    m: Tensor  # (V, dim) moving average of their sums
    codebook: Tensor  # (V, dim)
    initialized: Tensor  # () bool
    updates: Tensor  # () int64, t; only with `debias`

    def __init__(
        self,
        *,
        dim: Dimension = 256,
        codebook_size: Dimension = 1024,
        decay: Rate = 0.99,
        beta: NonNegativeFloat = 0.25,
        epsilon: PositiveFloat = 1e-5,
        revive: NonNegativeFloat = 0.03,
        init: CodebookInit = "latents",
        debias: bool = False,
    ) -> None:
        super().__init__()
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
        self.initialized_on_host = False  # a copy of `initialized` that needs no sync with the device
        self.register_load_state_dict_post_hook(reset_after_load)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents. In training with gradients, they count for the next `update`."""
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
        return rearrange(F.embedding(indices, self.codebook), "b h w d -> b d h w")

    @torch.no_grad()
    def update(self) -> dict[str, Tensor]:
        """Move averages and codes. Returns `revived`, the number of dead codes."""
        if (stats := self.step_stats.pop()) is None:
            return {}
        (n, total), latents = stats
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
        """Set the codes by latents: random ones far from all latents would never be chosen."""
        if not self.initialized:
            flat = flat.to(self.m.dtype)
            codes = sample_latents(flat, self.vocab_size)
            self.codebook.copy_(kmeans(flat, codes) if self.init == "kmeans" else codes)
            self.m.copy_(self.codebook)
            self.initialized.fill_(True)
        self.initialized_on_host = True

    def _ema_rate(self) -> Tensor:
        """1 - γ; with `debias` (1 - γ) / (1 - γ^t), which stores a_t / (1 - γ^t), a_0 = 0."""
        rate = torch.full_like(self.N[0], 1 - self.decay)
        if self.debias:
            self.updates += 1
            rate = rate / (1 - self.decay ** self.updates.to(rate.dtype))
        return rate

    def _revive(self, latents: Tensor, dead: Tensor) -> None:
        samples = sample_latents(latents, self.vocab_size)
        count = max(1 - self.decay, self.revive)  # below `revive` the code would be dead again at once
        self.N.masked_fill_(dead, count)
        self.m.copy_(torch.where(dead[:, None], samples * count, self.m))
