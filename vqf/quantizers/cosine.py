"""VQ on the unit sphere, with few channels: the code of the smallest angle.

Vector-quantized Image Modeling with Improved VQGAN (ViT-VQGAN), https://arxiv.org/abs/2110.04627, section 3.2:
factorised and l2-normalised codes. Sizes, initialisation and the entropy term are those of LlamaGen,
Autoregressive Model Beats Diffusion, https://arxiv.org/abs/2406.06525.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqf.distributed import comm
from vqf.protocols import Quantized
from vqf.quantizers.code_revival import CodebookInit, make_revival
from vqf.quantizers.codebook import check_positive, index_counts, nearest, straight_through, usage_stats
from vqf.registry import register


@register("quantizer", "cosine")
class CosineQuantizer(nn.Module):
    """Nearest code on the unit sphere, https://arxiv.org/abs/2110.04627.

    |sg[ẑ] - ê|² + β |ẑ - sg[ê]|² with ẑ = z / |z| and ê = e / |e|; the decoder sees ê. Where `vq` leaves most of a
    large codebook unused, this uses nearly all of it.

    Args:
        dim: Channels of a code: few, so that near neighbours exist. 32 in ViT-VQGAN, 8 in LlamaGen.
        codebook_size: Number of codes.
        beta: Weight of the commitment term.
        weight: Weight of the two terms together in the total loss.
        entropy: Weight of the entropy term, off in both papers. It keeps a matrix with a row for every latent
            and a column for every code.
        entropy_temperature: Its softmax is over -|ẑ - ê|² divided by this.
        revive: As for `vq`.
        init: As for `vq`; the means of k-means are brought back to the sphere.
    """

    def __init__(
        self,
        *,
        dim: int = 8,
        codebook_size: int = 16384,
        beta: float = 0.25,
        weight: float = 1.0,
        entropy: float = 0.0,
        entropy_temperature: float = 0.01,
        revive: float = 0.0,
        init: CodebookInit | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, codebook_size=codebook_size)
        self.dim, self.vocab_size = dim, codebook_size
        self.beta, self.weight = beta, weight
        self.entropy, self.entropy_temperature = entropy, entropy_temperature
        self.codebook = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.codebook.weight, -1, 1)
        with torch.no_grad():
            self.codebook.weight.copy_(F.normalize(self.codebook.weight, dim=1))
        self.revival = make_revival(codebook_size, revive, init, F.normalize)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents (B, dim, h, w); the result has norm 1 in every cell."""
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
            # -|ẑ - ê|² is 2 ẑ·ê but for a constant
            loss = loss + self.entropy * entropy_loss(2 * flat @ codes.T / self.entropy_temperature, self.training)
        stats = {
            **usage_stats(index_counts(indices, self.vocab_size), self.training),
            "commitment": commitment_loss.detach(),
        }
        return Quantized(straight_through(z, e), indices, loss, stats)

    def update(self) -> dict[str, Tensor]:
        """End an optimizer step: move codes that nobody uses, if asked to; returns how many."""
        return {} if self.revival is None else self.revival.update(self.codebook.weight)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes (B, dim, h, w) of indices (B, h, w), each of norm 1."""
        return rearrange(F.normalize(self.codebook(indices), dim=-1), "b h w d -> b d h w")


def entropy_loss(logits: Tensor, training: bool = False) -> Tensor:
    """E[H(p)] - H(E[p]) for logits (N, V): small where every latent is sure of a code and all codes are used.

    Args:
        logits: (N, V).
        training: Whether every process is here with its part of the batch: E[p] is over all of it.
    """
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    mean = comm.all_reduce_mean_with_grad(p.mean(0)) if training else p.mean(0)
    return -(p * log_p).sum(1).mean() + (mean * mean.clamp(min=1e-10).log()).sum()
