"""Quantizers with several codebooks or scales."""
