"""VQ with the rotation trick: the gradient turns with the latent instead of being copied.

Restructuring Vector Quantization with the Rotation Trick, https://arxiv.org/abs/2410.06424, section 4:
q̃ = λ R z with R = I - 2 r rᵀ + 2 q̂ ẑᵀ, r = (ẑ + q̂) / |ẑ + q̂| and λ = |q| / |z|, where λ and R count as
constants. R turns ẑ into q̂ in the plane of both, so that q̃ = q.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from vqf.quantizers.code_revival import CodebookInit
from vqf.quantizers.codebook import straight_through
from vqf.quantizers.vq import VectorQuantizer
from vqf.registry import register

EPSILON = 1e-6  # lower limit of a norm that is divided by, as in the authors' code


@register("quantizer", "rotation")
class RotationQuantizer(VectorQuantizer):
    """Nearest codebook entry, gradient by the rotation trick, https://arxiv.org/abs/2410.06424.

    A gradient keeps its angle to the code: what would push codes apart also pushes the latents of one code apart.
    In one dimension there is no plane to turn in, and straight-through differs by λ alone.

    Args:
        dim: As for `vq`.
        codebook_size: As for `vq`.
        beta: As for `vq`.
        beta_placement: As for `vq`.
        weight: As for `vq`.
        revive: As for `vq`.
        init: As for `vq`.
    """

    def __init__(
        self,
        *,
        dim: int = 256,
        codebook_size: int = 1024,
        beta: float = 0.25,
        beta_placement: Literal["commitment", "codebook"] = "commitment",
        weight: float = 1.0,
        revive: float = 0.0,
        init: CodebookInit | None = None,
    ) -> None:
        super().__init__(
            dim=dim,
            codebook_size=codebook_size,
            beta=beta,
            beta_placement=beta_placement,
            weight=weight,
            revive=revive,
            init=init,
        )

    def estimate_gradient(self, z: Tensor, e: Tensor) -> Tensor:
        """Return the codes `e` (B, dim, h, w), with the gradient for `z` of turning and scaling it onto them."""
        return straight_through(rotate(z, e), e)


def rotate(z: Tensor, q: Tensor) -> Tensor:
    """Turn and scale vectors z (B, D, h, w) onto q; only z itself has a gradient."""
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
