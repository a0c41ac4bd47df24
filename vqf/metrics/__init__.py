"""Metrics of reconstructions, codebooks and samples."""

from vqf.metrics import codebook, distortion, fid, inception_score, kid, perceptual, prdc

__all__ = ["codebook", "distortion", "fid", "inception_score", "kid", "perceptual", "prdc"]
