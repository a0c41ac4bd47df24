"""Quantizers."""

from vqf.quantizers import bsq, cosine, ema, fsq, gumbel, lfq, rotation, vq

__all__ = ["bsq", "cosine", "ema", "fsq", "gumbel", "lfq", "rotation", "vq"]
