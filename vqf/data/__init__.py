"""Sources of pictures."""

from vqf.data import emoji, folder, shards

__all__ = ["emoji", "folder", "shards"]
