"""Frozen networks and their weight files."""
