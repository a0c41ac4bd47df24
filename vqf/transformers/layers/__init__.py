"""Layers that the priors share: causal attention and its key-value caches."""
