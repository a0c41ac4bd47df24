"""Helpers of `pipeline=plan`."""
