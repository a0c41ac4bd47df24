"""VQ with a codebook of moving averages, and the revival of codes that nobody uses.

Neural Discrete Representation Learning, https://arxiv.org/abs/1711.00937, appendix A.1, with the Laplace smoothing of
Sonnet's VectorQuantizerEMA. Sonnet starts both averages at 0 and divides them by 1 - γ^t; here they start at N = 1 and
m = e, as if every code had been chosen once, and need no such division (so does vector-quantize-pytorch). Revival as
in Jukebox, https://arxiv.org/abs/2005.00341, section 3.1.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqf import ranks
from vqf.protocols import Quantized
from vqf.quantizers.codebook import check_positive, histogram, nearest, straight_through, usage
from vqf.registry import register

KMEANS_ROUNDS = 10


@register("quantizer", "ema")
class EMAQuantizer(nn.Module):
    """Codes are moving averages of the latents they stand for, https://arxiv.org/abs/1711.00937.

    N_k ← γ N_k + (1-γ) n_k,  m_k ← γ m_k + (1-γ) Σ z,  e_k ← m_k / N_k with N_k smoothed by ε.
    In eval mode nothing moves. The averages are updated after the look-up, from all ranks.

    Args:
        dim: Channels of a code.
        codebook_size: Number of codes.
        decay: γ.
        beta: Weight of the commitment term |z - sg[e]|².
        epsilon: ε of the Laplace smoothing.
        revive: A code whose N_k falls below this is moved to a random latent of the batch, with the averages
            of a code that was counted there once, and at least this N_k; 0 never revives.
        start: Where codes begin, on the first batch of training: at latents of it, or at the means of a few
            rounds of k-means from there.
    """

    N: Tensor
    m: Tensor
    codebook: Tensor
    started: Tensor

    def __init__(
        self,
        *,
        dim: int = 256,
        codebook_size: int = 1024,
        decay: float = 0.99,
        beta: float = 0.25,
        epsilon: float = 1e-5,
        revive: float = 0.03,
        start: Literal["latents", "kmeans"] = "latents",
    ) -> None:
        super().__init__()
        check_positive(dim=dim, codebook_size=codebook_size)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        self.dim, self.vocab_size = dim, codebook_size
        self.decay, self.beta, self.epsilon, self.revive, self.start = decay, beta, epsilon, revive, start
        self.register_buffer("codebook", torch.randn(codebook_size, dim))
        self.register_buffer("N", torch.ones(codebook_size))
        self.register_buffer("m", self.codebook.clone())
        self.register_buffer("started", torch.tensor(False))
        self.known_started = False  # spares the host from asking the device, once it has said yes
        self.register_load_state_dict_post_hook(_ask_again)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents (B, dim, h, w); in training, move the codebook towards them."""
        b, _, h, _ = z.shape
        flat = rearrange(z.detach(), "b d h w -> (b h w) d")
        if self.training and not self.known_started:
            self._start(flat)
        chosen = nearest(flat, self.codebook)
        indices = rearrange(chosen, "(b h w) -> b h w", b=b, h=h)
        e = self.lookup(indices)
        commitment_loss = F.mse_loss(z, e)
        stats = {**usage(histogram(indices, self.vocab_size), self.training), "commitment": commitment_loss.detach()}
        if self.training:
            stats["revived"] = self._update(flat, chosen)
        return Quantized(straight_through(z, e), indices, self.beta * commitment_loss, stats)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes (B, dim, h, w) of indices (B, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "b h w d -> b d h w")

    @torch.no_grad()
    def _start(self, flat: Tensor) -> None:
        """Begin with codes at latents of the first batch: random ones far away would never be chosen."""
        if not self.started:
            codes = self._draw(flat)
            self.codebook.copy_(self._kmeans(flat, codes) if self.start == "kmeans" else codes)
            self.m.copy_(self.codebook)
            self.started.fill_(True)
        self.known_started = True

    def _kmeans(self, flat: Tensor, codes: Tensor) -> Tensor:
        """Improve codes by Lloyd's algorithm; one that nobody chooses stays."""
        for _ in range(KMEANS_ROUNDS):
            n, total = self._count(flat, nearest(flat, codes))
            codes = torch.where(n[:, None] > 0, total / n.clamp(min=1)[:, None], codes)
        return codes

    @torch.no_grad()
    def _update(self, flat: Tensor, chosen: Tensor) -> Tensor:
        n, total = self._count(flat, chosen)
        self.N.lerp_(n, 1 - self.decay)
        self.m.lerp_(total, 1 - self.decay)
        dead = self.N < self.revive
        if self.revive > 0:
            self._revive(flat, dead)
        size = self.N.sum()
        smoothed = (self.N + self.epsilon) / (size + self.vocab_size * self.epsilon) * size
        self.codebook.copy_(self.m / smoothed[:, None])
        return dead.sum()

    def _revive(self, flat: Tensor, dead: Tensor) -> None:
        fresh = self._draw(flat)
        average = max(1 - self.decay, self.revive)  # with less it would be dead again before anyone saw it
        # The sums move together with the code: a code revived without them falls back at the next update.
        self.N.masked_fill_(dead, average)
        self.m.copy_(torch.where(dead[:, None], fresh * average, self.m))

    def _count(self, flat: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return, over all ranks, how often each code was chosen (V,) and the sum of its latents (V, dim)."""
        n = histogram(chosen, self.vocab_size).to(self.N.dtype)
        total = torch.zeros_like(self.m).index_add_(0, chosen, flat.to(self.m.dtype))
        return ranks.total(n), ranks.total(total)

    def _draw(self, flat: Tensor) -> Tensor:
        """Draw a latent of the batch for every code, from all ranks, with a little noise where they repeat."""
        count, several = self.vocab_size, ranks.world() * len(flat)
        if several >= count:
            return self._at(flat, torch.randperm(several, device=flat.device)[:count])
        drawn = self._at(flat, torch.randint(several, (count,), device=flat.device))
        return drawn + 0.01 * drawn.std() * ranks.from_first(torch.randn_like(drawn))

    def _at(self, flat: Tensor, rows: Tensor) -> Tensor:
        """Return rows of the latents of all ranks behind each other, those that the first rank has drawn."""
        rows = ranks.from_first(rows)
        mine = (rows // len(flat) == ranks.rank())[:, None]
        return ranks.total(torch.where(mine, flat[rows % len(flat)], 0).to(self.m.dtype))


def _ask_again(quantizer: nn.Module, incompatible_keys: Any) -> None:
    """After loading a state, `started` may be anything."""
    quantizer.known_started = False  # type: ignore[assignment]
