"""Conditioners: conditions as prefix tokens."""
