"""Encoders and decoders."""

from vqf.encoders import conv, magvit, vit

__all__ = ["conv", "magvit", "vit"]
