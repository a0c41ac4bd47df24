"""Encoders and the decoders that mirror them."""

from vqf.encoders import conv

__all__ = ["conv"]
