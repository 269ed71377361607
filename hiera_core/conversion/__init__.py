"""Convert checkpoints to other formats, and verify the result."""
