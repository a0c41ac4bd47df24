"""Several processes: collectives, the engine (single, DDP, FSDP2) and log messages of other ranks."""
