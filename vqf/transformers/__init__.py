"""Stage 2: priors, conditioners, and samplers."""

from vqf.transformers import gpt, llama
from vqf.transformers.conditioners import coordinates, label, spatial
from vqf.transformers.samplers import autoregressive, scorers, sliding_window

__all__ = ["autoregressive", "coordinates", "gpt", "label", "llama", "scorers", "sliding_window", "spatial"]
