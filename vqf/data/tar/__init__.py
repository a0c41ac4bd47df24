"""Tar shards in the webdataset layout."""
