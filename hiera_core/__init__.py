"""Hiera for images and video. `import hiera_core as hiera` is a drop-in for hiera-transformer.

Names are resolved when they are first used, so that listing the zoo does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import zoo as _zoo
from .version import __version__

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .benchmarking.bench import Benchmark as Benchmark
    from .benchmarking.bench import bench as bench
    from .conversion.converter import Conversion as Conversion
    from .conversion.converter import convert as convert
    from .data.clip_sampling import Sampling as Sampling
    from .data.transforms import transform_for as transform_for
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import DeviceError as DeviceError
    from .errors import HieraError as HieraError
    from .errors import HubError as HubError
    from .errors import InputError as InputError
    from .errors import OutputError as OutputError
    from .errors import TrainingError as TrainingError
    from .errors import UsageError as UsageError
    from .inference.evaluate import Evaluation as Evaluation
    from .inference.evaluate import evaluate as evaluate
    from .inference.features import FeatureExtractor as FeatureExtractor
    from .inference.features import Features as Features
    from .inference.features import FeatureSelection as FeatureSelection
    from .inference.features import features as features
    from .inference.predict import Classifier as Classifier
    from .inference.predict import Predictor as Predictor
    from .inference.predict import predict as predict
    from .inference.reconstruct import Reconstruction as Reconstruction
    from .inference.reconstruct import Reconstructor as Reconstructor
    from .inference.reconstruct import reconstruct as reconstruct
    from .models.attention import MaskUnitAttention as MaskUnitAttention
    from .models.attention_maps import AttentionMaps as AttentionMaps
    from .models.attention_maps import attention_maps as attention_maps
    from .models.block import HieraBlock as HieraBlock
    from .models.cpu import optimize_for_inference as optimize_for_inference
    from .models.factory import ModelFunction
    from .models.factory import create_model as create_model
    from .models.factory import list_models as list_models
    from .models.feature_backbone import FeatureBackbone as FeatureBackbone
    from .models.hiera import Hiera as Hiera
    from .models.layers import Head as Head
    from .models.layers import PatchEmbed as PatchEmbed
    from .models.mae import MaskedAutoencoderHiera as MaskedAutoencoderHiera
    from .models.sam2.hieradet import HieraDet as HieraDet
    from .models.token_layout import TokenLayout as TokenLayout
    from .probing.probe import probe as probe
    from .training.build import RunOptions as RunOptions
    from .training.recipe import Recipe as Recipe
    from .training.trainer import TrainingResult as TrainingResult
    from .training.trainer import train as train

    hiera_tiny_224: ModelFunction
    hiera_small_224: ModelFunction
    hiera_base_224: ModelFunction
    hiera_base_plus_224: ModelFunction
    hiera_large_224: ModelFunction
    hiera_huge_224: ModelFunction
    hiera_base_16x224: ModelFunction
    hiera_base_plus_16x224: ModelFunction
    hiera_large_16x224: ModelFunction
    hiera_huge_16x224: ModelFunction
    hiera_small_abswin_256: ModelFunction
    hiera_base_abswin_256: ModelFunction
    sam2_hiera_tiny: ModelFunction
    sam2_hiera_small: ModelFunction
    sam2_hiera_base_plus: ModelFunction
    sam2_hiera_large: ModelFunction
    hiera_nano_32: ModelFunction
    hiera_nano_8x32: ModelFunction
    mae_hiera_tiny_224: ModelFunction
    mae_hiera_small_224: ModelFunction
    mae_hiera_base_224: ModelFunction
    mae_hiera_base_plus_224: ModelFunction
    mae_hiera_large_224: ModelFunction
    mae_hiera_huge_224: ModelFunction
    mae_hiera_base_16x224: ModelFunction
    mae_hiera_base_plus_16x224: ModelFunction
    mae_hiera_large_16x224: ModelFunction
    mae_hiera_huge_16x224: ModelFunction
    mae_hiera_nano_32: ModelFunction
    mae_hiera_nano_8x32: ModelFunction

_PUBLIC = {
    "inference.predict": ("predict", "Predictor", "Classifier"),
    "inference.features": ("features", "Features", "FeatureExtractor", "FeatureSelection"),
    "inference.reconstruct": ("reconstruct", "Reconstruction", "Reconstructor"),
    "inference.evaluate": ("evaluate", "Evaluation"),
    "probing.probe": ("probe",),
    "training.trainer": ("train", "TrainingResult"),
    "training.build": ("RunOptions",),
    "training.recipe": ("Recipe",),
    "conversion.converter": ("convert", "Conversion"),
    "benchmarking.bench": ("bench", "Benchmark"),
    "models.factory": ("create_model", "list_models", *_zoo.names()),
    "models.block": ("HieraBlock",),
    "models.hiera": ("Hiera",),
    "models.mae": ("MaskedAutoencoderHiera",),
    "models.attention": ("MaskUnitAttention",),
    "models.cpu": ("optimize_for_inference",),
    "models.attention_maps": ("AttentionMaps", "attention_maps"),
    "models.layers": ("Head", "PatchEmbed"),
    "models.sam2.hieradet": ("HieraDet",),
    "models.token_layout": ("TokenLayout",),
    "models.feature_backbone": ("FeatureBackbone",),
    "data.clip_sampling": ("Sampling",),
    "data.transforms": ("transform_for",),
    "errors": (
        "HieraError",
        "UsageError",
        "ConfigError",
        "CheckpointError",
        "HubError",
        "DeviceError",
        "OutputError",
        "TrainingError",
        "InputError",
    ),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    try:
        return importlib.import_module(f".{name}", __name__)  # such as hiera_core.benchmarking
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
