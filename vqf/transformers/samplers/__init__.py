"""Samplers and scorers: filters, guidance, autoregressive sampling and sliding windows."""
