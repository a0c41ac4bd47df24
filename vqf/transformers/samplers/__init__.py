"""Samplers: drawing tokens from a prior, with filters, guidance and sliding windows."""
