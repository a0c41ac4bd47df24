"""Evaluation of tokenizers and priors."""

from vqf.evaluation import protocols

__all__ = ["protocols"]
