"""Gumbel-softmax: the encoder gives a distribution over codes, training draws from it.

Categorical Reparameterization with Gumbel-Softmax, https://arxiv.org/abs/1611.01144; as a quantizer in Zero-Shot
Text-to-Image Generation (DALL-E), https://arxiv.org/abs/2102.12092, and in the published VQGAN with 8 pixels a code.
"""

import math

import torch
from einops import einsum
from torch import Tensor, nn

from vqf.protocols import Quantized
from vqf.quantizers.codebook import check_positive, index_counts, usage_stats
from vqf.registry import register


@register("quantizer", "gumbel")
class GumbelQuantizer(nn.Module):
    """Codes are drawn in training, the likeliest is taken in eval mode, https://arxiv.org/abs/1611.01144.

    y = softmax((l + g) / τ) with logits l and Gumbel noise g. The code of VQGAN draws g in eval mode as well, so
    that one image has many encodings; here g = 0 then, and `lookup` gives back what was encoded.

    Args:
        dim: Channels of a code, and of the latents that a 1x1 convolution turns into logits.
        codebook_size: Number of codes, 8192 in the published VQGAN.
        straight_through: Take one code and the gradient of y; otherwise training mixes all codes by y.
        kl_weight: Weight of KL(softmax(l) | uniform); the published VQGAN has 1e-8.
        temperature_start: τ.
        temperature_end: τ after `anneal_steps`; the published VQGAN goes from 0.9 to 1e-6.
        anneal_steps: Optimizer steps over which τ falls along half a cosine; 0 keeps it where it starts.
    """

    steps: Tensor

    def __init__(
        self,
        *,
        dim: int = 256,
        codebook_size: int = 1024,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temperature_start: float = 0.9,
        temperature_end: float = 1e-6,
        anneal_steps: int = 0,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, codebook_size=codebook_size)
        if not (temperature_start > 0 and temperature_end > 0):
            raise ValueError(
                f"temperature_start={temperature_start} and temperature_end={temperature_end} divide; both are above 0"
            )
        self.dim, self.vocab_size = dim, codebook_size
        self.straight_through, self.kl_weight = straight_through, kl_weight
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.anneal_steps = anneal_steps
        self.proj = nn.Conv2d(dim, codebook_size, 1)
        self.codebook = nn.Embedding(codebook_size, dim)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents (B, dim, h, w)."""
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
        """End an optimizer step, as which the temperature counts it."""
        self.steps += 1
        return {}

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes (B, dim, h, w) of indices (B, h, w)."""
        return self.codebook(indices).movedim(-1, 1)

    def _embed(self, y: Tensor, indices: Tensor) -> Tensor:
        """Mix the codes by y (B, V, h, w), or take one of them and, for the gradient, the mixture."""
        if self.training and not self.straight_through:
            return _mix(y, self.codebook.weight)
        if not y.requires_grad:
            return self.lookup(indices)
        mixed = _mix(y, self.codebook.weight.detach())
        return self.lookup(indices) + (mixed - mixed.detach())

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
