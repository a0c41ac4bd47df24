"""VQ-VAE's vector quantization.

Neural Discrete Representation Learning, https://arxiv.org/abs/1711.00937, equation 3:
log p(x|z_q) + |sg[z_e] - e|² + β |z_e - sg[e]|².
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqf.options.ranges import Dimension, NonNegativeFloat
from vqf.protocols import Quantized
from vqf.quantizers.code_revival import CodebookInit, make_revival
from vqf.quantizers.codebook import index_counts, nearest, straight_through, usage_stats
from vqf.registry import register


@register("quantizer", "vq")
class VectorQuantizer(nn.Module):
    """Nearest code vector, straight-through gradient, https://arxiv.org/abs/1711.00937.

    Args:
        dim: Channels of a code vector (embed_dim).
        codebook_size: Number of codes (n_embed).
        beta: β, the weight of one of the two terms of the loss; 0.25 in the papers of VQ-VAE and VQGAN.
        beta_placement: The term that β multiplies. `commitment` is the equation. `codebook` is the code of VQGAN
            (`legacy=True`), with which every published VQGAN was trained: a commitment weight of 1.
        weight: Weight of both terms in the total loss (codebook_weight).
        revive: A code is moved to a random latent of the batch if the moving average of its occurrences a step is below
            this; 0 never revives.
        init: Initial codes, set after the first step: `latents` of its batch, or `kmeans` centers of them; by default
            random, as published.
    """

    def __init__(
        self,
        *,
        dim: Dimension = 256,
        codebook_size: Dimension = 1024,
        beta: NonNegativeFloat = 0.25,
        beta_placement: Literal["commitment", "codebook"] = "commitment",
        weight: NonNegativeFloat = 1.0,
        revive: NonNegativeFloat = 0.0,
        init: CodebookInit | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.vocab_size = dim, codebook_size
        self.weight = weight
        self.codebook_weight = beta if beta_placement == "codebook" else 1.0
        self.commitment_weight = beta if beta_placement == "commitment" else 1.0
        self.codebook = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.codebook.weight, -1 / codebook_size, 1 / codebook_size)
        self.revival = make_revival(codebook_size, revive, init)

    def forward(self, z: Tensor) -> Quantized:
        b, _, h, _ = z.shape
        flat = rearrange(z.detach(), "b d h w -> (b h w) d")
        chosen = nearest(flat, self.codebook.weight.detach())
        if self.revival is not None and self.training and torch.is_grad_enabled():
            self.revival.observe(flat, chosen)
        indices = rearrange(chosen, "(b h w) -> b h w", b=b, h=h)
        e = self.lookup(indices)
        codebook_loss = F.mse_loss(e, z.detach())
        commitment_loss = F.mse_loss(z, e.detach())
        loss = self.weight * (self.codebook_weight * codebook_loss + self.commitment_weight * commitment_loss)
        stats = {
            **usage_stats(index_counts(indices, self.vocab_size), self.training),
            "commitment": commitment_loss.detach(),
        }
        return Quantized(self.estimate_gradient(z, e), indices, loss, stats)

    def update(self) -> dict[str, Tensor]:
        return {} if self.revival is None else self.revival.update(self.codebook.weight)

    def estimate_gradient(self, z: Tensor, e: Tensor) -> Tensor:
        """The codes `e` with a gradient for the latents `z`."""
        return straight_through(z, e)

    def lookup(self, indices: Tensor) -> Tensor:
        return rearrange(self.codebook(indices), "b h w d -> b d h w")
