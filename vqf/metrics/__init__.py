"""Metrics: what held-out reconstructions and their codes are worth, in numbers."""

from vqf.metrics import codebook, distortion, perceptual

__all__ = ["codebook", "distortion", "perceptual"]
