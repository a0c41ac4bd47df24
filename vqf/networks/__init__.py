"""Frozen networks: perceptual distances, feature extractors, and their weight files."""
