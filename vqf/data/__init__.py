"""Sources of pictures."""

from vqf.data import emoji, folder

__all__ = ["emoji", "folder"]
