"""Evaluation: protocols, reconstruction and generation metrics, cached features, class accuracy."""

from vqf.evaluation import protocols

__all__ = ["protocols"]
