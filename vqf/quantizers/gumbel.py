"""Gumbel-softmax quantization.

Categorical Reparameterization with Gumbel-Softmax, https://arxiv.org/abs/1611.01144; Zero-Shot Text-to-Image
Generation (DALL-E), https://arxiv.org/abs/2102.12092.
"""

import math

import torch
from einops import einsum
from torch import Tensor, nn

from vqf.options.ranges import Dimension, NonNegativeFloat, NonNegativeInt, PositiveFloat
from vqf.protocols import Quantized
from vqf.quantizers.codebook import index_counts, usage_stats
from vqf.registry import register


@register("quantizer", "gumbel")
class GumbelQuantizer(nn.Module):
    """Samples codes in training, takes the most likely one in eval mode, https://arxiv.org/abs/1611.01144.

    y = softmax((l + g) / τ) with logits l and Gumbel noise g. In eval mode g = 0, unlike in VQGAN's code.

    Args:
        dim: Channels of a code vector and of the latents, from which a 1x1 convolution computes l.
        codebook_size: Number of codes; 8192 in the published VQGAN.
        straight_through: Whether training uses one code with the gradient of y, or the mean of all codes weighted by y.
        kl_weight: Weight of KL(softmax(l) | uniform); 1e-8 in the published VQGAN.
        temperature_start: τ at the start.
        temperature_end: τ after `anneal_steps`; from 0.9 to 1e-6 in the published VQGAN.
        anneal_steps: Optimizer steps over which τ falls along half a cosine; 0 keeps `temperature_start`.
    """

    steps: Tensor  # () int64, optimizer steps so far

    def __init__(
        self,
        *,
        dim: Dimension = 256,
        codebook_size: Dimension = 1024,
        straight_through: bool = True,
        kl_weight: NonNegativeFloat = 5e-4,
        temperature_start: PositiveFloat = 0.9,
        temperature_end: PositiveFloat = 1e-6,
        anneal_steps: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.dim, self.vocab_size = dim, codebook_size
        self.straight_through, self.kl_weight = straight_through, kl_weight
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.anneal_steps = anneal_steps
        self.proj = nn.Conv2d(dim, codebook_size, 1)
        self.codebook = nn.Embedding(codebook_size, dim)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, z: Tensor) -> Quantized:
        logits = self.proj(z)
        temperature = self._temperature(logits)
        noisy = logits + _gumbel(logits) if self.training else logits
        indices = noisy.argmax(1)
        latents = self._embed((noisy / temperature).softmax(1), indices)
        kl = self._kl(logits)
        counts = index_counts(indices, self.vocab_size)
        stats = {**usage_stats(counts, self.training), "kl": kl.detach(), "temperature": temperature}
        return Quantized(latents, indices, self.kl_weight * kl, stats)

    def update(self) -> dict[str, Tensor]:
        self.steps += 1
        return {}

    def lookup(self, indices: Tensor) -> Tensor:
        return self.codebook(indices).movedim(-1, 1)

    def _embed(self, y: Tensor, indices: Tensor) -> Tensor:
        """The codes of the indices with the gradient of the mean weighted by y (B, V, h, w); or that mean."""
        if self.training and not self.straight_through:
            return _mix(y, self.codebook.weight)
        if not y.requires_grad:
            return self.lookup(indices)
        mean = _mix(y, self.codebook.weight.detach())
        return self.lookup(indices) + (mean - mean.detach())

    def _kl(self, logits: Tensor) -> Tensor:
        q = logits.softmax(1)
        return (q * (q * self.vocab_size + 1e-10).log()).sum(1).mean()

    def _temperature(self, logits: Tensor) -> Tensor:
        if self.anneal_steps <= 0:
            return logits.new_full((), self.temperature_start)
        t = (self.steps.to(logits.dtype) / self.anneal_steps).clamp(max=1)
        return self.temperature_end + (self.temperature_start - self.temperature_end) * (1 + (math.pi * t).cos()) / 2


def _gumbel(logits: Tensor) -> Tensor:
    return -torch.empty_like(logits).exponential_().log()


def _mix(y: Tensor, codebook: Tensor) -> Tensor:
    return einsum(y, codebook, "b v h w, v d -> b d h w")
