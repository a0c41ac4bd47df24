"""Order of the data, loader processes, unreadable images, and cached token shards."""
