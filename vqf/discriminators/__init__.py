"""Discriminators and their regularizers."""

from vqf.discriminators import patchgan, regularizers

__all__ = ["patchgan", "regularizers"]
