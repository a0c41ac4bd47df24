"""Frozen networks that describe images: perceptual distances, feature extractors, their weight files."""
