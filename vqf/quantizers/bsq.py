"""Binary spherical quantization: the signs of latents on the unit sphere.

Image and Video Tokenization with Binary Spherical Quantization, https://arxiv.org/abs/2406.07548, section 4.1.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vqf.options.ranges import NonNegativeFloat, PositiveFloat
from vqf.quantizers.codebook import straight_through
from vqf.quantizers.signs import GroupBits, SignQuantizer
from vqf.registry import register


@register("quantizer", "bsq")
class BinarySphericalQuantizer(SignQuantizer):
    """The signs of normalized latents, themselves of length 1, https://arxiv.org/abs/2406.07548.

    u = z / |z|, q = sign(u) / √D; loss β |u - sg[q]|² + `entropy` (E[H(p)] - γ H(E[p])) with p = softmax(2 u·c / τ)
    over all codes c, where H(E[p]) is the sum over bits; the gradient of q goes to u / √D.

    Good for very many codes (18 to 36 bits and more): the error is at most √(2 - 2/√D), and the entropy term costs as
    much as a channel. For a prior give `factors`. For few codes learned ones (`vq`, `cosine`) reconstruct better.

    Args:
        beta: Weight of the commitment term, summed over channels; 0 in the authors' settings.
        temperature: τ of the probability of a code, softmax(2 u·c / τ).
        entropy_group: Bits whose codes H(E[p]) counts together: 1 in the authors' settings, 9 by default in
            their code. 0 is all bits of a codebook.
    """

    def __init__(
        self,
        *,
        beta: NonNegativeFloat = 0.0,
        temperature: PositiveFloat = 1.0,
        entropy_group: GroupBits = 1,
        **options: Any,
    ) -> None:
        super().__init__(beta=beta, temperature=temperature, entropy_group=entropy_group, **options)

    @staticmethod
    def scale_of(dim: int) -> float:
        return 1 / math.sqrt(dim)

    def normalize(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1)

    def commitment(self, v: Tensor, q: Tensor) -> Tensor:
        return (v - q).square().sum(1).mean()

    def estimate_gradient(self, v: Tensor, q: Tensor) -> Tensor:
        return straight_through(self.scale * v, q)
