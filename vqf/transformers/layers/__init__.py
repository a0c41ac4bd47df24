"""The causal transformer of the priors, and its caches."""
