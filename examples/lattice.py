"""A custom quantizer in one file: every channel rounds to a grid of a few levels in [-1, 1].

    python -m vqf.run experiment=quickstart plugins=[examples/lattice.py] model/quantizer=lattice

Its options are available on the command line: model.quantizer.levels=7.
"""

import torch
from torch import Tensor, nn

from vqf import register
from vqf.protocols import Quantized


@register("quantizer", "lattice")
class Lattice(nn.Module):
    """Round each of `dim` channels to one of `levels` values."""

    def __init__(self, *, dim: int = 4, levels: int = 5) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels={levels}: a grid needs at least 2")
        self.dim, self.levels, self.vocab_size = dim, levels, levels**dim
        self.register_buffer("values", torch.linspace(-1, 1, levels))
        self.register_buffer("places", levels ** torch.arange(dim).view(1, -1, 1, 1))

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents (B, dim, h, w)."""
        bounded = z.tanh()
        digits = ((bounded + 1) / 2 * (self.levels - 1)).round().long()
        indices = (digits * self.places).sum(1)
        codes = self.lookup(indices)
        return Quantized(codes + (bounded - bounded.detach()), indices, loss=z.new_zeros(()))

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> codes (B, dim, h, w)."""
        return self.values[indices[:, None] // self.places % self.levels]
