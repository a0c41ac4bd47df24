"""Losses: distances of a reconstruction to its image, and the objectives of the adversarial game."""

from vqf.losses import adversarial, classes, perceptual, pixel

__all__ = ["adversarial", "classes", "perceptual", "pixel"]
