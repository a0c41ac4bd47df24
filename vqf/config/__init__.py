"""Configs: composed, checked, explained and compared before anything is built."""
