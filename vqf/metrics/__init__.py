"""Metrics of reconstructions, of codebook usage, and of generated samples."""

from vqf.metrics import codebook, distortion, fid, inception_score, kid, perceptual, prdc

__all__ = ["codebook", "distortion", "fid", "inception_score", "kid", "perceptual", "prdc"]
