"""Encoders and decoders."""

from vqf.encoders import conv, magvit, timm_backbone, titok, vit

__all__ = ["conv", "magvit", "timm_backbone", "titok", "vit"]
