"""Encoders and decoders."""

from vqf.encoders import conv

__all__ = ["conv"]
