"""Shared by the priors: the causal transformer, and its key-value caches."""
