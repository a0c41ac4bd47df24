"""Sources of images."""

from vqf.data import earth, emoji, folder, pairs, shard_pairs, shards, union

__all__ = ["earth", "emoji", "folder", "pairs", "shard_pairs", "shards", "union"]
