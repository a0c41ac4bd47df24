"""Helpers of `pipeline=compare`: read runs, rank them, reconstruct images, write the table and the page."""
