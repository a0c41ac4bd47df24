"""Tar shards in the webdataset layout: index, random access, streaming and remote addresses."""
