"""The zoo: models, checkpoints and class names. Nothing here imports torch."""

from .registry import (
    ASSETS,
    DEFAULT_IMAGE_MODEL,
    DEFAULT_VIDEO_MODEL,
    CheckpointEntry,
    Family,
    ModelEntry,
    block_dims,
    check_is_hiera,
    get,
    models,
    names,
    split_tag,
)

__all__ = [
    "ASSETS",
    "DEFAULT_IMAGE_MODEL",
    "DEFAULT_VIDEO_MODEL",
    "CheckpointEntry",
    "Family",
    "ModelEntry",
    "block_dims",
    "check_is_hiera",
    "get",
    "models",
    "names",
    "split_tag",
]
