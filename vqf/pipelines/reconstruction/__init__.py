"""Helpers of pipeline=reconstruct."""
