"""Helpers of `pipeline=compare`: a table and a page over several runs."""
