"""Helpers of `pipeline=sample` and `pipeline=complete`."""
