"""Imports and exports checkpoints of other projects."""
