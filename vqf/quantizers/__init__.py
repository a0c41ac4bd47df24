"""Quantizers."""

from vqf.quantizers import bsq, cosine, ema, fsq, gumbel, ibq, lfq, rotation, simvq, vq
from vqf.quantizers.layered import multiscale, product, residual

__all__ = [
    "bsq",
    "cosine",
    "ema",
    "fsq",
    "gumbel",
    "ibq",
    "lfq",
    "multiscale",
    "product",
    "residual",
    "rotation",
    "simvq",
    "vq",
]
