"""A run on disk: its folder, lock, checkpoints, resume, log and provenance."""
