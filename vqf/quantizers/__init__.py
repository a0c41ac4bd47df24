"""Quantizers: latents to codes and back."""

from vqf.quantizers import cosine, ema, gumbel, rotation, vector

__all__ = ["cosine", "ema", "gumbel", "rotation", "vector"]
