"""The records that a run keeps beside its checkpoints: any of them may be missing or damaged."""
