"""Which weights of a model a run trains: all, some blocks, or low-rank adapters."""
