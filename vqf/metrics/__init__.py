"""Metrics: what held-out reconstructions, their codes, and samples are worth, in numbers."""

from vqf.metrics import codebook, distortion, frechet, kernel, neighbours, perceptual, score

__all__ = ["codebook", "distortion", "frechet", "kernel", "neighbours", "perceptual", "score"]
