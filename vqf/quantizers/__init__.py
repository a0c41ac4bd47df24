"""Quantizers."""

from vqf.quantizers import bsq, cosine, ema, fsq, gumbel, ibq, lfq, rotation, simvq, vq

__all__ = ["bsq", "cosine", "ema", "fsq", "gumbel", "ibq", "lfq", "rotation", "simvq", "vq"]
