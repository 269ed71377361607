"""The inputs of a run divided among processes: shards, and manifests that are cut by their rows."""
