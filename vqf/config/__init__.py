"""Composes, checks, explains and compares configs."""
