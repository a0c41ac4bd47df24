"""Conditioners: what a prior is told about an image, as tokens in front of it."""
