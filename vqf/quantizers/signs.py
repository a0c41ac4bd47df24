"""Codes of signs: what quantizers of one bit a channel have in common.

The entropies are exact and never hold a matrix of all latents by all codes. With codes of independent bits,
p(c|z) = Π_i p(c_i|z_i). So the entropy of p(c|z) is the sum over its bits, and the mean over latents of p(c|z) is the
product of two matrices, those of the first and of the second half of the bits.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from vqf.batch import Size
from vqf.distributed import comm
from vqf.options.ranges import Dimension, NonNegativeFloat, PositiveFloat
from vqf.protocols import Quantized
from vqf.quantizers.codebook import straight_through
from vqf.quantizers.product_codebook import DigitOrder, Factors, ProductCodebook
from vqf.tokens.layout import TokenLayout

MAX_JOINT_BITS = 20  # of a group of bits whose codes are enumerated

GroupBits = Annotated[int, Interval(ge=0, le=MAX_JOINT_BITS)]


class SignQuantizer(nn.Module):
    """One bit a channel, without a table of codes.

    Args:
        dim: Bits, one for each channel. There are 2^dim codes.
        factors: Bits of each codebook, as [6,12] for a codebook of 2^6 and one of 2^12; by default one codebook of all
            bits. A prior enumerates the codes of each codebook, so it needs several from 20 bits on.
        beta: Weight of the commitment term.
        entropy: Weight of the entropy term, E[H(p)] - γ H(E[p]): low if latents are certain of their code, and all
            codes are used.
        diversity: γ. Higher values use more codes.
        temperature: τ of the probability of a code, softmax(2 z·c / τ).
        entropy_group: Bits whose codes H(E[p]) counts together; the sum over groups, inside of each codebook,
            is at least the entropy of all bits, and equal if they are independent. 0 is all bits of a codebook.
        entropy_epsilon: ε in H(E[p]) = -Σ p ln(p + ε); 0 is exact.
        bit_order: Whether the first channel is the lowest bit of an index (`little`), or the highest, as in
            vector-quantize-pytorch and the code of BSQ.
    """

    def __init__(
        self,
        *,
        dim: Dimension = 18,
        factors: Factors | None = None,
        beta: NonNegativeFloat = 0.25,
        entropy: NonNegativeFloat = 0.1,
        diversity: NonNegativeFloat = 1.0,
        temperature: PositiveFloat = 0.01,
        entropy_group: GroupBits = 0,
        entropy_epsilon: NonNegativeFloat = 0.0,
        bit_order: DigitOrder = "little",
    ) -> None:
        super().__init__()
        self.beta, self.entropy, self.diversity = beta, entropy, diversity
        self.temperature, self.entropy_epsilon = temperature, entropy_epsilon
        self.scale = self.scale_of(dim)
        self.codebook = ProductCodebook([(-self.scale, self.scale)] * dim, factors, bit_order)
        self.dim, self.vocab_size = dim, self.codebook.vocab_size
        self.groups = entropy_groups(self.codebook.factors, entropy_group) if entropy else []

    @staticmethod
    def scale_of(dim: int) -> float:
        """The absolute value of the channels of a code."""
        return 1.0

    def normalize(self, z: Tensor) -> Tensor:
        """The latents whose signs are the bits."""
        return z

    def commitment(self, v: Tensor, q: Tensor) -> Tensor:
        return F.mse_loss(v, q)

    def estimate_gradient(self, v: Tensor, q: Tensor) -> Tensor:
        """The codes `q` with a gradient for the normalized latents `v`."""
        return straight_through(v, q)

    def layout(self, grid: Size, stride: int | None) -> TokenLayout:
        return self.codebook.layout(grid, stride)

    def forward(self, z: Tensor) -> Quantized:
        v = self.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))
        bits = (v > 0).long()
        indices, q = self.codebook.encode(bits), self.codebook.latents(bits).to(v.dtype)
        commitment = self.commitment(v, q)
        loss, stats = self.beta * commitment, self.codebook.usage_stats(indices, self.training)
        if self.entropy:
            # 2 v·c / τ with c_i = ± scale: the log-odds of bit i
            logits = 4 * self.scale / self.temperature * v.movedim(1, -1).flatten(0, -2)
            certainty = bit_entropy(logits)
            usage = mean_entropy(logits, self.groups, self.entropy_epsilon, self.training)
            loss = loss + self.entropy * (certainty - self.diversity * usage)
            stats |= {"sample_entropy": certainty.detach(), "codebook_entropy": usage.detach()}
        stats["commitment"] = commitment.detach()
        return Quantized(self.estimate_gradient(v, q).to(z.dtype), indices, loss.to(z.dtype), stats)

    def lookup(self, indices: Tensor) -> Tensor:
        return self.codebook.lookup(indices)


def entropy_groups(factors: Sequence[int], size: int) -> list[int]:
    """Bits of each group whose codes are counted together: `size` or fewer, inside of one codebook; 0 is all.

    Raises:
        ValueError: If a group has more than 20 bits.
    """
    groups = [min(size or bits, bits - start) for bits in factors for start in range(0, bits, size or bits)]
    if max(groups) > MAX_JOINT_BITS:
        raise ValueError(
            f"entropy_group={size}: the entropy of {max(groups)} bits together would enumerate 2^{max(groups)} codes; "
            f"give 1 to {MAX_JOINT_BITS} bits, such as entropy_group=9, or several codebooks with factors=[...]"
        )
    return groups


def bit_entropy(logits: Tensor) -> Tensor:
    """E[H(p)] in nats, of independent bits with log-odds (N, D)."""
    odds = logits.abs()  # an even function; so written, nothing cancels
    return (F.softplus(-odds) + odds * torch.sigmoid(-odds)).sum(1).mean()


def mean_entropy(logits: Tensor, groups: Sequence[int], epsilon: float = 0.0, training: bool = False) -> Tensor:
    """Σ H(E[p]) in nats over groups of bits, of independent bits with log-odds (N, D).

    Args:
        epsilon: ε in -Σ p ln(p + ε).
        training: Whether E[p] is over all ranks, which must all call this then.
    """
    mean = torch.cat([mean_probabilities(group) for group in logits.split(list(groups), dim=1)])
    mean = comm.all_reduce_mean_with_grad(mean) if training else mean
    return -(mean * (mean.clamp(min=torch.finfo(mean.dtype).tiny) + epsilon).log()).sum()


def mean_probabilities(logits: Tensor) -> Tensor:
    """E[p] (2^g,) of the codes of g independent bits with log-odds (N, g)."""
    count, bits = logits.shape
    first, second = (code_probabilities(half) for half in logits.split([bits // 2, bits - bits // 2], dim=1))
    return (first.T @ second / count).flatten()


def code_probabilities(logits: Tensor) -> Tensor:
    """p (N, 2^g) of the codes of g independent bits with log-odds (N, g)."""
    bits = logits.shape[1]
    positions = torch.arange(bits, device=logits.device)
    codes = (torch.arange(2**bits, device=logits.device)[:, None] >> positions & 1).to(logits.dtype)
    return (F.logsigmoid(logits) @ codes.T + F.logsigmoid(-logits) @ (1 - codes).T).exp()
