"""Files of SAM 2's image encoder in Meta's naming, and for timm and transformers."""

from __future__ import annotations

from typing import Any

import torch

from ..data.transforms import ImageTransform
from ..device import DTYPES
from ..errors import UsageError
from ..weights import key_mapping
from ..weights.foreign_config import RESAMPLING, SAM2_ARGUMENTS
from .plan import ConversionPlan, normalisation, transformers_class

FORMATS_OF_SAM2 = ("hub", "sam2", "timm", "transformers")
STATE_KEY = "model"  # key of the tensors in Meta's files
# Arguments that timm's model has under the same names.
TIMM_NAMES = (
    "in_chans", "embed_dim", "num_heads", "stages", "window_spec", "global_att_blocks",
    "global_pos_size", "patch_kernel", "patch_stride", "patch_padding", "init_values",
)  # fmt: skip
TIMM_MODELS = ("sam2_hiera_tiny", "sam2_hiera_small", "sam2_hiera_base_plus", "sam2_hiera_large")


def check_format(plan: ConversionPlan, name: str) -> None:
    """Check that a format can hold SAM 2's encoder.

    Raises:
        UsageError: It cannot.
    """
    if name not in FORMATS_OF_SAM2:
        raise UsageError(
            f"{name} cannot hold SAM 2's image encoder", f"use {', '.join(FORMATS_OF_SAM2)}"
        )
    config = plan.config
    if name == "transformers" and config.get("init_values") is not None:
        raise UsageError("transformers has no layer scale in SAM 2's encoder", "use hub or timm")
    if name == "timm" and config["mlp_ratio"] != 4:
        raise UsageError("timm has an mlp_ratio of 4 in SAM 2's encoder", "use hub or transformers")


def sam2_state(plan: ConversionPlan, naming: key_mapping.Naming) -> dict[str, torch.Tensor]:
    """Return the tensors of a plan in a naming. timm's model has a norm, which changes no map."""
    state = key_mapping.from_reference(plan.state, naming)
    if naming == "timm":
        width, dtype = plan.model.block_specs[-1].dim_out, DTYPES[plan.dtype]
        state["head.norm.weight"] = torch.ones(width, dtype=dtype)
        state["head.norm.bias"] = torch.zeros(width, dtype=dtype)
    return state


def timm_files(plan: ConversionPlan) -> dict[str, Any]:
    """Return config.json of a timm folder."""
    config, transform = plan.config, plan.transform
    assert isinstance(transform, ImageTransform)
    pretrained = {
        "input_size": (config["in_chans"], *plan.size),
        "num_classes": 0,
        "mean": transform.mean,
        "std": transform.std,
        "interpolation": transform.interpolation,
        "crop_pct": min(transform.size) / transform.resize,
        "crop_mode": transform.crop_mode,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": str(plan.card.get("licence", "")).lower(),
    }
    return {
        "config.json": {
            "architecture": plan.name if plan.name in TIMM_MODELS else TIMM_MODELS[0],
            "num_classes": 0,
            "num_features": plan.model.block_specs[-1].dim_out,
            "global_pool": "avg",
            "model_args": {name: config[name] for name in TIMM_NAMES if name in config},
            "pretrained_cfg": pretrained,
        }
    }


def transformers_files(plan: ConversionPlan) -> dict[str, Any]:
    """Return config.json and preprocessor_config.json of a transformers folder."""
    config, transform = plan.config, plan.transform
    assert isinstance(transform, ImageTransform)
    stages = range(len(config["stages"]))
    values = {theirs: config[ours] for ours, theirs in SAM2_ARGUMENTS.items()}
    values |= {
        "model_type": "sam2_hiera_det_model",
        "architectures": [transformers_class(plan)],
        "embed_dim_per_stage": [config["embed_dim"] * 2**stage for stage in stages],
        "num_attention_heads_per_stage": [config["num_heads"] * 2**stage for stage in stages],
        "num_query_pool_stages": len(stages) - 1,
        "query_stride": [2, 2],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "dtype": str(DTYPES.get(plan.dtype, plan.dtype)).removeprefix("torch."),
    }
    processor = {
        "image_processor_type": "Sam2ImageProcessor",
        "do_resize": True,
        "size": dict(zip(("height", "width"), transform.size, strict=True)),
        "resample": RESAMPLING.index(transform.interpolation),
        **normalisation(transform),
    }
    return {"config.json": values, "preprocessor_config.json": processor}
