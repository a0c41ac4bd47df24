"""Helpers of `pipeline=compare`."""
