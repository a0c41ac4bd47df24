"""Samplers and scorers."""
