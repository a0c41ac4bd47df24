"""SimVQ: a frozen codebook seen through a learned linear map.

Addressing Representation Collapse in Vector Quantized Models with One Linear Layer, https://arxiv.org/abs/2411.02038,
equation 6: e = C W with a random C that stays as it is, so that every step moves all codes.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqf.options.ranges import Dimension, NonNegativeFloat
from vqf.protocols import Quantized
from vqf.quantizers.codebook import index_counts, nearest, straight_through, usage_stats
from vqf.registry import register


@register("quantizer", "simvq")
class SimVQ(nn.Module):
    """Nearest code vector W c + b of frozen vectors c, https://arxiv.org/abs/2411.02038.

    |sg[z] - e|² + β |z - sg[e]|² with e = W c_k + b, k = argmin |z - (W c_k + b)|; straight-through gradient.

    Good for large codebooks, which stay in use without entropy term or revival: 65,536 codes and more. Of a few
    thousand codes `ema` or `cosine` use all as well, and place them more freely than one linear map can.

    Args:
        dim: Channels of a code vector.
        codebook_size: Number of codes.
        beta: β, the weight of the commitment term.
        weight: Weight of both terms in the total loss.
        bias: Whether the map has a bias b, as in the authors' code; vector-quantize-pytorch has none.
    """

    codebook: Tensor  # (V, dim) frozen c ~ N(0, 1 / dim)

    def __init__(
        self,
        *,
        dim: Dimension = 128,
        codebook_size: Dimension = 65536,
        beta: NonNegativeFloat = 0.25,
        weight: NonNegativeFloat = 1.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.vocab_size = dim, codebook_size
        self.beta, self.weight = beta, weight
        self.register_buffer("codebook", torch.randn(codebook_size, dim) * dim**-0.5)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, z: Tensor) -> Quantized:
        b, _, h, _ = z.shape
        precise = torch.promote_types(z.dtype, torch.float32)
        flat = rearrange(z.detach(), "b d h w -> (b h w) d").to(precise)
        chosen = nearest(flat, self.proj(self.codebook).detach().to(precise))
        indices = rearrange(chosen, "(b h w) -> b h w", b=b, h=h)
        e = self.lookup(indices).to(z.dtype)
        commitment_loss = F.mse_loss(z, e.detach())
        loss = self.weight * (F.mse_loss(e, z.detach()) + self.beta * commitment_loss)
        stats = {
            **usage_stats(index_counts(indices, self.vocab_size), self.training),
            "commitment": commitment_loss.detach(),
        }
        return Quantized(straight_through(z, e), indices, loss, stats)

    def lookup(self, indices: Tensor) -> Tensor:
        return self.proj(F.embedding(indices, self.codebook)).movedim(-1, 1)
