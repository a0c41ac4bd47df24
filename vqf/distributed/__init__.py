"""Several processes: collectives, the engine (single, DDP, FSDP2), CPU threads, and log messages of other ranks."""
