"""Quantizers."""

from vqf.quantizers import cosine, ema, gumbel, rotation, vq

__all__ = ["cosine", "ema", "gumbel", "rotation", "vq"]
