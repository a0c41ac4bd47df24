"""VQ on the unit sphere.

Vector-quantized Image Modeling with Improved VQGAN (ViT-VQGAN), https://arxiv.org/abs/2110.04627, section 3.2; the
entropy term of LlamaGen, Autoregressive Model Beats Diffusion, https://arxiv.org/abs/2406.06525.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqf.distributed import comm
from vqf.options.ranges import Dimension, NonNegativeFloat, PositiveFloat
from vqf.protocols import Quantized
from vqf.quantizers.code_revival import CodebookInit, make_revival
from vqf.quantizers.codebook import index_counts, nearest, straight_through, usage_stats
from vqf.registry import register


@register("quantizer", "cosine")
class CosineQuantizer(nn.Module):
    """Nearest code vector on the unit sphere, https://arxiv.org/abs/2110.04627.

    |sg[ẑ] - ê|² + β |ẑ - sg[ê]|² with ẑ = z / |z| and ê = e / |e|; the decoder gets ê.

    Args:
        dim: Channels of a code vector: few, so that near neighbors exist. 32 in ViT-VQGAN, 8 in LlamaGen.
        codebook_size: Number of codes.
        beta: β, the weight of the commitment term.
        weight: Weight of both terms in the total loss.
        entropy: Weight of the entropy term, 0 in both papers. It keeps a matrix of all latents by all codes.
        entropy_temperature: Divides -|ẑ - ê|², the logits of the entropy term.
        revive: A code is moved to a random latent of the batch if the moving average of its occurrences a step is below
            this; 0 never revives.
        init: Initial codes, set after the first step: `latents` of its batch, or `kmeans` centers of them, normalized;
            by default random, as published.
    """

    def __init__(
        self,
        *,
        dim: Dimension = 8,
        codebook_size: Dimension = 16384,
        beta: NonNegativeFloat = 0.25,
        weight: NonNegativeFloat = 1.0,
        entropy: NonNegativeFloat = 0.0,
        entropy_temperature: PositiveFloat = 0.01,
        revive: NonNegativeFloat = 0.0,
        init: CodebookInit | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.vocab_size = dim, codebook_size
        self.beta, self.weight = beta, weight
        self.entropy, self.entropy_temperature = entropy, entropy_temperature
        self.codebook = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.codebook.weight, -1, 1)
        with torch.no_grad():
            self.codebook.weight.copy_(F.normalize(self.codebook.weight, dim=1))
        self.revival = make_revival(codebook_size, revive, init, F.normalize)

    def forward(self, z: Tensor) -> Quantized:
        b, _, h, _ = z.shape
        z = F.normalize(z, dim=1)
        flat, codes = rearrange(z, "b d h w -> (b h w) d"), F.normalize(self.codebook.weight, dim=1)
        chosen = nearest(flat.detach(), codes.detach())
        if self.revival is not None and self.training and torch.is_grad_enabled():
            self.revival.observe(flat.detach(), chosen)
        indices = rearrange(chosen, "(b h w) -> b h w", b=b, h=h)
        e = self.lookup(indices)
        commitment_loss = F.mse_loss(z, e.detach())
        loss = self.weight * (F.mse_loss(e, z.detach()) + self.beta * commitment_loss)
        if self.entropy:
            # -|ẑ - ê|² = 2 ẑ·ê - 2, and softmax ignores the constant
            loss = loss + self.entropy * entropy_loss(2 * flat @ codes.T / self.entropy_temperature, self.training)
        stats = {
            **usage_stats(index_counts(indices, self.vocab_size), self.training),
            "commitment": commitment_loss.detach(),
        }
        return Quantized(straight_through(z, e), indices, loss, stats)

    def update(self) -> dict[str, Tensor]:
        return {} if self.revival is None else self.revival.update(self.codebook.weight)

    def lookup(self, indices: Tensor) -> Tensor:
        return rearrange(F.normalize(self.codebook(indices), dim=-1), "b h w d -> b d h w")


def entropy_loss(logits: Tensor, training: bool = False) -> Tensor:
    """E[H(p)] - H(E[p]) of logits (N, V): low if latents are certain of their codes, and all codes are used.

    Args:
        training: Whether E[p] is over all ranks, which must all call this then.
    """
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    mean = comm.all_reduce_mean_with_grad(p.mean(0)) if training else p.mean(0)
    return -(p * log_p).sum(1).mean() + (mean * mean.clamp(min=1e-10).log()).sum()
