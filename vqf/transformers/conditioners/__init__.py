"""Conditioners: conditions as prefix tokens in front of the tokens of an image."""
