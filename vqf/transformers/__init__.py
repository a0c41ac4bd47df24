"""Stage 2: priors over token sequences, their conditioners, and sampling from them."""

from vqf.transformers import conditioners, gpt, guidance, llama, sampling, scorers, sliding, spatial

__all__ = ["conditioners", "gpt", "guidance", "llama", "sampling", "scorers", "sliding", "spatial"]
