"""Index backpropagation quantization: the gradient of every latent reaches all codes.

Scalable Image Tokenization with Index Backpropagation Quantization, https://arxiv.org/abs/2412.02692, equations 4 to 7.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqf.distributed import comm
from vqf.options.ranges import Dimension, NonNegativeFloat, PositiveFloat
from vqf.protocols import Quantized
from vqf.quantizers.codebook import index_counts, most_similar, usage_stats
from vqf.registry import register

ChunkBits = Annotated[int, Interval(ge=10, le=40)]


@register("quantizer", "ibq")
class IndexBackpropagationQuantizer(nn.Module):
    """The code of the largest dot product, with the gradient of a softmax over all codes, https://arxiv.org/abs/2412.02692.

    l = E z, p = softmax(l), h = onehot(argmax l) - sg[p] + p; the decoder gets q = Eᵀ h.
    |q - z|² + |sg[e] - z|² + β |e - sg[z]|² with e = Eᵀ onehot(argmax l), and `entropy` (E[H(p')] - H(E[p'])) with
    p' = softmax(l / τ).

    Good for large codebooks of wide codes (up to 262,144 of 256 channels) that stay in use. A training step costs nine
    products of all latents and codes, `vq` one, and their softmax three times; measured on one CPU core 25 to 40 times
    the time of `vq`. A part of `chunk_bits` of the matrix is held at once, a few times over. If that is too slow, take
    `simvq` or `lfq`. Without gradients there is no softmax, and the loss has no entropy term.

    Args:
        dim: Channels of a code vector.
        codebook_size: Number of codes.
        beta: β, the weight of the codebook term.
        weight: Weight of the three terms in the total loss.
        entropy: Weight of the entropy term, 0.05 in the paper; 0 leaves it out.
        entropy_temperature: τ.
        entropy_epsilon: ε in H(E[p']) = -Σ p ln(p + ε); 0 is exact, 1e-5 is the authors' code, where it exceeds 1 / V
            of their largest codebooks.
        chunk_bits: Hold at most 2^chunk_bits entries of the matrix of latents by codes at once (at least one row).
    """

    def __init__(
        self,
        *,
        dim: Dimension = 256,
        codebook_size: Dimension = 16384,
        beta: NonNegativeFloat = 0.25,
        weight: NonNegativeFloat = 1.0,
        entropy: NonNegativeFloat = 0.05,
        entropy_temperature: PositiveFloat = 0.01,
        entropy_epsilon: NonNegativeFloat = 0.0,
        chunk_bits: ChunkBits = 24,
    ) -> None:
        super().__init__()
        self.dim, self.vocab_size = dim, codebook_size
        self.beta, self.weight = beta, weight
        self.entropy, self.entropy_temperature, self.entropy_epsilon = entropy, entropy_temperature, entropy_epsilon
        self.chunk = 2**chunk_bits
        self.codebook = nn.Embedding(codebook_size, dim)

    def forward(self, z: Tensor) -> Quantized:
        b, _, h, _ = z.shape
        precise = torch.promote_types(z.dtype, torch.float32)
        flat = rearrange(z, "b d h w -> (b h w) d").to(precise)
        codes = self.codebook.weight.to(precise)
        chosen = most_similar(flat.detach(), codes.detach(), self.chunk)
        indices = rearrange(chosen, "(b h w) -> b h w", b=b, h=h)
        e, x = self.lookup(indices).to(precise), z.to(precise)
        q, entropy = e, x.new_zeros(())
        if torch.is_grad_enabled():
            mean, entropy = self._soft_codes(flat, codes)
            mean = rearrange(mean, "(b h w) d -> b d h w", b=b, h=h)
            q = e + (mean - mean.detach())
        commitment_loss = F.mse_loss(e.detach(), x)
        loss = self.weight * (F.mse_loss(q, x) + commitment_loss + self.beta * F.mse_loss(e, x.detach()))
        loss = loss + self.entropy * entropy
        stats = {
            **usage_stats(index_counts(indices, self.vocab_size), self.training),
            "commitment": commitment_loss.detach(),
        }
        return Quantized(q.to(z.dtype), indices, loss.to(z.dtype), stats)

    def lookup(self, indices: Tensor) -> Tensor:
        return self.codebook(indices).movedim(-1, 1)

    def _soft_codes(self, z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Eᵀ p (N, D), with a gradient through p alone, and the entropy term, in chunks that are computed again."""
        mean, entropy, total = [], z.new_zeros(()), codes.new_zeros(len(codes))
        for part in z.split(max(self.chunk // len(codes), 1)):
            options = (self.entropy_temperature, bool(self.entropy))
            rows, entropies, probabilities = checkpoint(soft_codes, part, codes, *options, use_reentrant=False)
            mean.append(rows)
            entropy, total = entropy + entropies, total + probabilities
        if self.entropy:
            p = total / len(z)
            p = comm.all_reduce_mean_with_grad(p) if self.training else p
            usage = -(p * (p.clamp(min=torch.finfo(p.dtype).tiny) + self.entropy_epsilon).log()).sum()
            entropy = entropy / len(z) - usage
        return torch.cat(mean), entropy


def soft_codes(z: Tensor, codes: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Eᵀ p of latents (N, D), their sum of H(p') () and of p' (V,), or zeros."""
    logits = z @ codes.T
    mean = logits.softmax(1) @ codes.detach()
    if not with_entropy:
        return mean, z.new_zeros(()), z.new_zeros(())
    log_p = (logits / temperature).log_softmax(1)
    p = log_p.exp()
    return mean, -(p * log_p).sum(), p.sum(0)
