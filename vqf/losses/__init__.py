"""Losses: distances of a reconstruction to its image, and the objectives of the adversarial game."""

from vqf.losses import adversarial, perceptual, pixel, segmentation

__all__ = ["adversarial", "perceptual", "pixel", "segmentation"]
