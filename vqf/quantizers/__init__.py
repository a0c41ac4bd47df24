"""Quantizers."""

from vqf.quantizers import cosine, ema, fsq, gumbel, rotation, vq

__all__ = ["cosine", "ema", "fsq", "gumbel", "rotation", "vq"]
