"""Hiera for images and video. `import hiera_core as hiera` is a drop-in for hiera-transformer.

Names are resolved when first used, so that looking at the zoo needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import zoo as _zoo
from .version import __version__

_PUBLIC = {
    "models.hiera": ("Hiera", "HieraBlock"),
    "models.mae": ("MaskedAutoencoderHiera",),
    "models.attention": ("MaskUnitAttention",),
    "models.layers": ("Head", "PatchEmbed"),
    "models.token_layout": ("TokenLayout",),
    "models.backbone": ("FeatureBackbone",),
    "models.factory": ("create_model", "list_models", *_zoo.names()),
    "inference.predict": ("predict", "Predictor", "Classifier"),
    "inference.reconstruct": ("reconstruct", "Reconstruction", "Reconstructor"),
    "inference.features": ("features", "FeatureExtractor", "FeatureSelection"),
    "data.clip_sampling": ("Sampling",),
    "errors": (
        "HieraError",
        "UsageError",
        "ConfigError",
        "CheckpointError",
        "HubError",
        "DeviceError",
        "OutputError",
        "InputError",
    ),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    try:
        return importlib.import_module(f".{name}", __name__)  # hiera_core.benchmarking and such
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
