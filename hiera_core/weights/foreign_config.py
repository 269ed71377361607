"""What the JSON files of timm and transformers say about a checkpoint, in our words: constructor
arguments, preprocessing and class names."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping
from typing import Any

from .. import zoo
from ..errors import CheckpointError

log = logging.getLogger("hiera")

# Maps our name of a constructor argument to timm's name.
TIMM_ARGUMENTS = {
    "input_size": "img_size",
    "head_dropout": "drop_rate",
    **{
        name: name
        for name in "in_chans embed_dim num_heads stages q_pool q_stride mask_unit_size "
        "mask_unit_attn dim_mul head_mul patch_kernel patch_stride patch_padding mlp_ratio "
        "drop_path_rate head_init_scale sep_pos_embed abs_win_pos_embed global_pos_size "
        "init_values use_expand_proj".split()
    },
}
TIMM_SAM2_ARGUMENTS = ("window_spec", "global_att_blocks")  # of SAM 2's encoder alone
# Arguments of timm's models that do not change what a loaded model computes; norm_layer would, and
# is checked.
TIMM_IGNORED = {
    "num_classes", "global_pool", "fix_init", "weight_init", "patch_drop_rate", "norm_layer",
    "device", "dtype",
}  # fmt: skip
# Maps our name of a constructor argument to its name in the config.json of transformers. Values
# that its config.json leaves out are the defaults of its HieraConfig, which are ours, too.
TRANSFORMERS_ARGUMENTS = {
    "input_size": "image_size",
    "in_chans": "num_channels",
    "embed_dim": "embed_dim",
    "stages": "depths",
    "q_pool": "num_query_pool",
    "q_stride": "query_stride",
    "mask_unit_size": "masked_unit_size",
    "mask_unit_attn": "masked_unit_attention",
    "dim_mul": "embed_dim_multiplier",
    "patch_kernel": "patch_size",
    "patch_stride": "patch_stride",
    "patch_padding": "patch_padding",
    "mlp_ratio": "mlp_ratio",
    "drop_path_rate": "drop_path_rate",
    "decoder_embed_dim": "decoder_hidden_size",
    "decoder_depth": "decoder_depth",
    "decoder_num_heads": "decoder_num_heads",
}
# Of SAM 2's encoder, whose config.json may be a part of that of the whole model.
SAM2_ARGUMENTS = {
    "input_size": "image_size",
    "in_chans": "num_channels",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "stages": "blocks_per_stage",
    "window_spec": "window_size_per_stage",
    "global_att_blocks": "global_attention_blocks",
    "global_pos_size": "window_positional_embedding_background_size",
    "patch_kernel": "patch_kernel_size",
    "patch_stride": "patch_stride",
    "patch_padding": "patch_padding",
    "mlp_ratio": "mlp_ratio",
}
SAM2_TYPES = ("sam2_hiera_det_model", "sam2_vision_model", "sam2", "sam2_video")
SAM2_BACKBONE = ("vision_config", "backbone_config")  # keys that lead to the encoder's values
PAIRS = ("input_size", "q_stride", "mask_unit_size", "patch_kernel", "patch_stride",
         "patch_padding")  # fmt: skip
MAX_CLASSES = 100_000  # a few bytes can name any class number
RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers

Facts = tuple[dict[str, Any] | None, dict[str, Any]]


def read_config(
    config: Mapping[str, Any], processor: Mapping[str, Any] | None, source: str
) -> Facts:
    """Return the constructor arguments and the card that another library's files describe.

    Args:
        config: config.json.
        processor: preprocessor_config.json, if there is one.
        source: The checkpoint, for messages.

    Returns:
        The constructor arguments, or None if config.json does not describe a Hiera; and the card:
        `preprocessing` and `classes`, as far as they are known.

    Raises:
        CheckpointError: A value contradicts another, or this toolkit cannot compute what it asks
            for.
    """
    try:
        if "architecture" in config:
            return _timm_arguments(config, source), _timm_card(config)
        config = _backbone_of(config)
        if _is_transformers_hiera(config):
            arguments = _transformers_arguments(config, source)
            return arguments, _transformers_card(config, processor or {}, source)
        if config.get("model_type") in SAM2_TYPES:
            return _sam2_arguments(config, source), _sam2_card(processor or {})
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{source}: config.json or preprocessor_config.json cannot be understood ({error})",
            "name the weights file itself to ignore them",
        ) from error
    return None, {}


# timm ---------------------------------------------------------------------------------------------


def _timm_arguments(config: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """Return constructor arguments; None if timm's architecture is not in the zoo."""
    given = dict(config.get("model_args") or {})
    norm = given.get("norm_layer") or "LayerNorm"
    if str(norm).lower() != "layernorm":
        raise _unsupported(source, "norm_layer", norm, "LayerNorm")
    name = str(config["architecture"]).partition(".")[0]
    ours = {theirs: name for name, theirs in TIMM_ARGUMENTS.items()}
    if name in zoo.models() and zoo.get(name).family == "hieradet":
        ours |= {name: name for name in TIMM_SAM2_ARGUMENTS}
    unknown = sorted(set(given) - set(ours) - TIMM_IGNORED)
    if unknown:
        log.warning("config.json: %s not understood, and ignored", ", ".join(unknown))
    arguments = {ours[name]: value for name, value in given.items() if name in ours}
    size = _timm_pretrained(config).get("input_size")
    if isinstance(size, list | tuple) and len(size) == 3:
        arguments = {"in_chans": size[0], "input_size": size[1:], **arguments}
    if name in zoo.models():
        return {**zoo.get(name).config, **_with_pairs(arguments)}
    return None if {"embed_dim", "stages"} - set(arguments) else _with_pairs(arguments)


def _timm_pretrained(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the pretrained_cfg. Old files have its values at the top level."""
    found = config.get("pretrained_cfg", config)
    return found if isinstance(found, Mapping) else {}


def _timm_card(config: Mapping[str, Any]) -> dict[str, Any]:
    pretrained, card = _timm_pretrained(config), dict[str, Any]()
    preprocessing: dict[str, Any] = {
        k: list(pretrained[k]) for k in ("mean", "std") if k in pretrained
    }
    mode, crop = pretrained.get("crop_mode") or "center", float(pretrained.get("crop_pct") or 1.0)
    if mode == "squash" and crop == 1:
        preprocessing["crop_mode"] = mode
    elif mode != "center":
        log.warning(
            "config.json: crop_mode = %s, crop_pct = %s is not supported; the centre is cropped",
            mode,
            crop,
        )
    if "interpolation" in pretrained:
        preprocessing["interpolation"] = pretrained["interpolation"]
    size = pretrained.get("input_size")
    if isinstance(size, list | tuple) and len(size) == 3:
        preprocessing["size"] = list(size[1:])
        # timm's rule for the short side, which rounds down.
        preprocessing["resize"] = math.floor(min(size[1:]) / crop + 1e-6)
    if preprocessing:
        card["preprocessing"] = preprocessing
    names = _timm_class_names(config) or _timm_class_names(pretrained)
    if names:
        card["classes"] = names
    return card


def _timm_class_names(config: Mapping[str, Any]) -> list[str] | None:
    """Return the class names of a config.json: descriptions, such as `tench` for n01440764, where
    there are any."""
    names = config.get("label_names")
    if isinstance(names, Mapping):  # by class index
        names = _in_order(names)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    described = config.get("label_descriptions")
    described = described if isinstance(described, Mapping) else {}
    return [str(described.get(name, name)) for name in names]


# transformers -------------------------------------------------------------------------------------


def _backbone_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a config.json says about its Hiera: that of a detector has it under a key."""
    found = config.get("backbone_config")
    if isinstance(found, Mapping) and found.get("model_type") == "hiera":
        return found
    return config


def _is_transformers_hiera(config: Mapping[str, Any]) -> bool:
    """Return whether this is the config.json of a Hiera of transformers, by its type or, if that
    has been lost, by names that only it has."""
    named = config.get("model_type")
    return named == "hiera" or (named is None and {"depths", "masked_unit_size"} <= set(config))


def _transformers_arguments(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    for name, supported in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        if config.get(name, supported) != supported:
            raise _unsupported(source, name, config[name], supported)
    arguments = {
        ours: config[theirs]
        for ours, theirs in TRANSFORMERS_ARGUMENTS.items()
        if config.get(theirs) is not None
    }
    heads = config.get("num_heads")
    if isinstance(heads, list | tuple) and heads:
        factor = heads[1] / heads[0] if len(heads) > 1 else 2.0
        if any(after != before * factor for before, after in itertools.pairwise(heads)):
            raise CheckpointError(
                f"{source}: config.json has num_heads = {list(heads)}; the factor from stage to "
                "stage must be the same",
                "use a checkpoint of the usual architecture",
            )
        arguments |= {"num_heads": heads[0], "head_mul": factor}
    return _with_pairs(arguments)


def _sam2_arguments(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the constructor arguments of SAM 2's encoder."""
    for key in SAM2_BACKBONE:
        config = config.get(key, config)
    stages = config.get("blocks_per_stage", (1, 2, 7, 2))
    dim, heads = config.get("hidden_size", 96), config.get("num_attention_heads", 1)
    expected = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "query_stride": [2, 2],
        "num_query_pool_stages": len(stages) - 1,
        "embed_dim_per_stage": [dim * 2**stage for stage in range(len(stages))],
        "num_attention_heads_per_stage": [heads * 2**stage for stage in range(len(stages))],
    }
    for name, supported in expected.items():
        if config.get(name, supported) != supported:
            raise _unsupported(source, name, config[name], supported)
    return _with_pairs(
        {
            ours: config[theirs]
            for ours, theirs in SAM2_ARGUMENTS.items()
            if config.get(theirs) is not None
        }
    )


def _sam2_card(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card of SAM 2: the whole image is resized, to height and width."""
    if not processor:
        return {}
    found = _processor_preprocessing({**processor, "size": None, "crop_size": None})
    if shape := _processor_size(processor.get("size")):
        found |= {"size": shape, "resize": min(shape), "crop_mode": "squash"}
    return {"preprocessing": found}


def _transformers_card(
    config: Mapping[str, Any], processor: Mapping[str, Any], source: str
) -> dict[str, Any]:
    card: dict[str, Any] = {}
    if processor:
        card["preprocessing"] = _processor_preprocessing(processor)
    names = _parse_id2label(config["id2label"], source) if "id2label" in config else []
    # transformers writes LABEL_0, LABEL_1, ... if nobody has given names.
    if any(name != f"LABEL_{number}" for number, name in enumerate(names)):
        card["classes"] = names
    return card


def _processor_preprocessing(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing of a preprocessor_config.json, in the form of zoo.yaml."""
    found: dict[str, Any] = {}
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        mean, std = [0.0], [1.0]
    if mean is not None and std is not None:
        # Pixels in 0..255 are multiplied by this factor; ours are divided by 255.
        factor = (
            processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
        )
        scale = 255 * float(factor)
        if math.isclose(scale, 1.0):
            scale = 1.0
        found["mean"] = [float(value) / scale for value in mean]
        found["std"] = [float(value) / scale for value in std]
    size, crop = processor.get("size"), processor.get("crop_size")
    if not processor.get("do_resize", True):
        log.warning("preprocessor_config.json: do_resize = false is ignored; images are resized")
    elif isinstance(size, list | tuple) or (isinstance(size, Mapping) and "height" in size):
        log.warning(
            "preprocessor_config.json: size = %s would change the aspect ratio; "
            "images keep theirs, and their centre is cropped",
            size,
        )
    crop = crop if processor.get("do_center_crop", True) else None
    resized = _processor_size(size)
    shape = _processor_size(crop) or resized
    if shape:
        found["size"] = shape
        found["resize"] = min(resized or shape)
    number = processor.get("resample")
    if isinstance(number, int) and 0 <= number < len(RESAMPLING):
        found["interpolation"] = RESAMPLING[number]
    return found


def _processor_size(size: Any) -> list[int] | None:
    """Return [height, width] of 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if isinstance(size, int):
        return [size, size]
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return [int(size["shortest_edge"])] * 2
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return [int(size["height"]), int(size["width"])]
    return [int(value) for value in size] if isinstance(size, list | tuple) else None


def _parse_id2label(id2label: Any, source: str) -> list[str]:
    """Return class names from transformers' format: {"0": "tench", ...}.

    Raises:
        CheckpointError: `id2label` has another format.
    """
    try:
        return [str(name) for name in _in_order(id2label)]
    except (AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: id2label in config.json does not map numbers to class names",
            "fix or remove it",
        ) from error


def _unsupported(source: str, name: str, value: Any, supported: Any) -> CheckpointError:
    return CheckpointError(
        f"{source}: config.json has {name} = {value}, and Hiera has {supported}",
        "use a checkpoint of the usual architecture",
    )


def _in_order(numbered: Mapping[Any, Any]) -> list[Any]:
    """Return class names by their numbers. A number that has no name is its own name.

    Raises:
        ValueError: A key is no number, or too large.
    """
    names = {int(number): name for number, name in numbered.items()}
    count = max(names, default=-1) + 1
    if count > MAX_CLASSES:
        raise ValueError(f"class number {count - 1} is above {MAX_CLASSES - 1}")
    return [names.get(number, str(number)) for number in range(count)]


def _with_pairs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments in which a single number for both dimensions is written as two."""
    return {
        name: [value, value] if name in PAIRS and isinstance(value, int) else value
        for name, value in arguments.items()
    }
