"""Reconstruction losses and GAN objectives."""

from vqf.losses import adversarial, perceptual, pixel, segmentation

__all__ = ["adversarial", "perceptual", "pixel", "segmentation"]
