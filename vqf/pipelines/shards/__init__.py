"""Helpers of `pipeline=shard`: write, verify and resume tar shards."""
