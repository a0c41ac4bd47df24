"""Helpers of `pipeline=import`."""
