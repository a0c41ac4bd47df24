"""Helpers of `pipeline=shard`: writing, checking and resuming tar shards."""
