"""Conversion of checkpoints to other formats, verified."""
