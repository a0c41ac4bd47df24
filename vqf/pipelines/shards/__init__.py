"""Helpers of `pipeline=shard`."""
