"""VQ with the rotation trick: the gradient is rotated with the latent.

Restructuring Vector Quantization with the Rotation Trick, https://arxiv.org/abs/2410.06424, section 4: q̃ = λ R z = q
with R = I - 2 r rᵀ + 2 q̂ ẑᵀ, r = (ẑ + q̂) / |ẑ + q̂| and λ = |q| / |z|, where λ and R are constants to autograd.
"""

import torch.nn.functional as F
from torch import Tensor

from vqf.quantizers.codebook import straight_through
from vqf.quantizers.vq import VectorQuantizer
from vqf.registry import register

EPSILON = 1e-6  # smallest divisor, as in the authors' code


@register("quantizer", "rotation")
class RotationQuantizer(VectorQuantizer):
    """`vq` with the gradient of the rotation trick, https://arxiv.org/abs/2410.06424.

    The angle between gradient and code vector stays the same at the latent. All options are those of `vq`.
    """

    def estimate_gradient(self, z: Tensor, e: Tensor) -> Tensor:
        return straight_through(rotate(z, e), e)  # exactly e: q̃ is e but for rounding


def rotate(z: Tensor, q: Tensor) -> Tensor:
    """q̃ = λ R z for vectors z, q (B, D, h, w)."""
    fixed, q = z.detach(), q.detach()
    z_hat, q_hat = _unit(fixed), _unit(q)
    r = _unit(z_hat + q_hat)
    scale = _norm(q) / _norm(fixed).clamp(min=EPSILON)
    return scale * (z - 2 * r * _dot(r, z) + 2 * q_hat * _dot(z_hat, z))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1, eps=EPSILON)


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=1, keepdim=True)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1, keepdim=True)
