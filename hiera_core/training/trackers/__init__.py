"""Programs that show the measurements of runs: one interface for all of them."""
