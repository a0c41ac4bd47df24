"""Discriminators: images to logits of being real; and what keeps them from winning too early."""

from vqf.discriminators import patchgan, regularizers

__all__ = ["patchgan", "regularizers"]
