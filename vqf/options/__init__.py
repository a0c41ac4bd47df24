"""Annotations of options: their ranges, and the config nodes that hold their values."""
