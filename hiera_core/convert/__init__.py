"""Checkpoints to other formats, proven: `hiera_core.convert.pipeline.convert`."""
