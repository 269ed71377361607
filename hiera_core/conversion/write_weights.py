"""Write weights in the naming of a library, in the folder or file that it expects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..data.transforms import ImageTransform
from ..device import DTYPES
from ..errors import UsageError
from ..models.config import HieraConfig
from ..weights import files, key_mapping
from ..weights.download_record import sha256_of
from ..weights.foreign_config import RESAMPLING, TIMM_ARGUMENTS, TRANSFORMERS_ARGUMENTS
from . import sam2_files
from .formats import FORMATS, WEIGHTS_NAME
from .model_card import model_card
from .plan import ConversionPlan, normalisation, transformers_class

_KINDS = {1: "signals", 3: "video"}  # by number of input dimensions


def write_weights(plan: ConversionPlan, name: str, path: Path) -> dict[str, Any]:
    """Write the weights of a plan, and the files that belong to them.

    Args:
        plan: The model to write.
        name: Name of the format.
        path: The file, or an existing folder.

    Returns:
        The tensors, by their names in the file.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    naming = FORMATS[name].naming or "reference"
    if plan.is_sam2:
        state = sam2_files.sam2_state(plan, naming)
    else:
        state = key_mapping.from_reference(plan.state, naming, plan.config["stages"])
    extras = {"config": plan.config, "card": plan.card}
    if not FORMATS[name].folder:
        key = {"key": sam2_files.STATE_KEY} if name == "sam2" else {}
        files.write_pickle(path, state, extras, **key)
        return state
    is_hub = name == "hub"  # its folder has config.json and hiera.json in place of the extras
    files.write_safetensors(path / WEIGHTS_NAME, state, None if is_hub else extras)
    # Only the hub gets a checksum, because computing it takes longer than writing.
    checksum = sha256_of(path / WEIGHTS_NAME) if is_hub else ""
    configs = CONFIGS | SAM2_CONFIGS if plan.is_sam2 else CONFIGS
    for file, content in configs[name](plan).items():
        files.write_json(path / file, content)
    with atomic_file(path / "README.md") as temporary:
        temporary.write_text(model_card(plan, name, checksum), encoding="utf-8")
    return state


def check_representable(plan: ConversionPlan, name: str) -> None:
    """Check that a format can hold the model of a plan.

    Raises:
        UsageError: The format cannot; the hint names formats that can.
    """
    if plan.is_sam2:
        sam2_files.check_format(plan, name)
        return
    if name == "sam2":
        raise UsageError(
            f"sam2 is for SAM 2's image encoder, and {plan.name} is not one", "use hub or pth"
        )
    config, dims = plan.config, len(plan.size)
    if name in ("timm", "transformers") and dims != 2:
        raise UsageError(f"{name} has no Hiera for {_KINDS[dims]}", "use hub or pth")
    if name in ("timm", "transformers") and config.get("norm_layer", "LayerNorm") != "LayerNorm":
        raise UsageError(f"{name} has no Hiera with {config['norm_layer']}", "use hub or pth")
    if name != "timm" and not config.get("use_expand_proj", True):
        raise UsageError(
            f"{name} has no Hiera that widens without a projection", "use timm, onnx or pt2"
        )
    if name == "transformers":
        step = config["q_stride"][0] ** (len(config["stages"]) - 1)
        if config["mask_unit_size"][0] % step:
            raise UsageError(
                f"transformers has no Hiera with a mask unit size of {config['mask_unit_size']}: "
                f"it must be a multiple of {step}",
                "use hub, pth or timm",
            )
        if not _has_same_windows(plan):
            raise UsageError(
                f"transformers would attend within other windows than {plan.name}: it expects "
                "every stage to pool, and a stage whose first block is global to be all global",
                "use hub or pth",
            )


def _has_same_windows(plan: ConversionPlan) -> bool:
    """Return whether every block attends within the same windows by the rule of transformers."""
    windowed = plan.config["mask_unit_attn"]
    specs = plan.model.block_specs
    for spec, before in zip(specs, [None, *specs], strict=False):
        starts_stage = before is not None and before.stage != spec.stage
        theirs = windowed[spec.stage] or (starts_stage and windowed[spec.stage - 1])
        if theirs != spec.use_mask_unit_attn or (theirs and spec.stage > plan.config["q_pool"]):
            return False
    return True


def _hub_files(plan: ConversionPlan) -> dict[str, Any]:
    """Return config.json and hiera.json of a hub folder."""
    return {"config.json": plan.config, "hiera.json": plan.card}


def _timm_files(plan: ConversionPlan) -> dict[str, Any]:
    """Return config.json of a timm folder.

    timm loads the folder with `create_model("local-dir:FOLDER")`, or the weights file with
    `create_model(architecture, checkpoint_path=..., **model_args)`.
    """
    config = {**vars(HieraConfig()), **plan.config}
    arguments = {theirs: config[ours] for ours, theirs in TIMM_ARGUMENTS.items()}
    if not arguments["abs_win_pos_embed"]:
        del arguments["abs_win_pos_embed"], arguments["global_pos_size"]
    for argument in ("init_values", "use_expand_proj"):
        if arguments[argument] == getattr(HieraConfig, argument):
            del arguments[argument]
    transform = plan.transform
    pretrained = {
        "input_size": (config["in_chans"], *plan.size),
        "fixed_input_size": True,
        "num_classes": plan.num_classes,
        "mean": transform.mean,
        "std": transform.std,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": str(plan.card.get("licence", "")).lower(),
    }
    if isinstance(transform, ImageTransform):
        pretrained["interpolation"] = transform.interpolation
        pretrained["crop_pct"] = min(transform.size) / transform.resize
    if names := plan.class_names:
        pretrained["label_names"] = names
    return {
        "config.json": {
            "architecture": timm_architecture(plan.name),
            "num_classes": plan.num_classes,
            "num_features": plan.model.block_specs[-1].dim_out,
            "global_pool": "avg",
            "model_args": arguments,
            "pretrained_cfg": pretrained,
        }
    }


def timm_architecture(name: str) -> str:
    """Return timm's name for a model. If timm has none, return hiera_base_224, all of whose
    arguments config.json overrides."""
    name = name.removeprefix("mae_")
    sizes = ("tiny", "small", "base", "base_plus", "large", "huge")
    known = [f"hiera_{size}_224" for size in sizes]
    known += ["hiera_small_abswin_256", "hiera_base_abswin_256"]
    return name if name in known else "hiera_base_224"


def _transformers_files(plan: ConversionPlan) -> dict[str, Any]:
    """Return config.json and preprocessor_config.json of a transformers folder."""
    config, stages = plan.config, plan.config["stages"]
    values = {
        theirs: config[ours] for ours, theirs in TRANSFORMERS_ARGUMENTS.items() if ours in config
    }
    first_blocks = [sum(stages[:stage]) for stage in range(len(stages))]
    values |= {
        "model_type": "hiera",
        "architectures": [transformers_class(plan)],
        "num_heads": [plan.model.block_specs[block].heads for block in first_blocks],
        "layer_norm_eps": 1e-6,
        "dtype": str(DTYPES.get(plan.dtype, plan.dtype)).removeprefix("torch."),
    }
    if plan.num_classes:
        names = plan.class_names or [f"LABEL_{i}" for i in range(plan.num_classes)]
        values["id2label"] = {str(number): label for number, label in enumerate(names)}
        values["label2id"] = {label: number for number, label in enumerate(names)}
    transform = plan.transform
    assert isinstance(transform, ImageTransform)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": transform.resize},
        "resample": RESAMPLING.index(transform.interpolation),
        "do_center_crop": True,
        "crop_size": dict(zip(("height", "width"), transform.size, strict=True)),
        **normalisation(transform),
    }
    return {"config.json": values, "preprocessor_config.json": processor}


# Functions that return the content of a folder's JSON files, by file name.
CONFIGS: dict[str, Callable[[ConversionPlan], dict[str, Any]]] = {
    "hub": _hub_files,
    "timm": _timm_files,
    "transformers": _transformers_files,
}
SAM2_CONFIGS: dict[str, Callable[[ConversionPlan], dict[str, Any]]] = {
    "timm": sam2_files.timm_files,
    "transformers": sam2_files.transformers_files,
}
