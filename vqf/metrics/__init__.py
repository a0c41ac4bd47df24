"""Metrics: what held-out reconstructions, their codes, and samples are worth, in numbers."""

from vqf.metrics import codebook, distortion, fid, inception_score, kid, perceptual, prdc

__all__ = ["codebook", "distortion", "fid", "inception_score", "kid", "perceptual", "prdc"]
