"""Fixtures of the metrics' tests."""

from tests.metrics.sets import linear

__all__ = ["linear"]
