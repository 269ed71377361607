"""Functions that timm calls to build our models, one for each model in the zoo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .. import zoo
from ..errors import UsageError
from ..models.factory import create_model
from ..models.hiera import Hiera

try:
    from timm.models import generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError("hiera_core.timm_models needs timm: pip install timm") from error

PREFIX = "hiera_core_"

# Arguments by timm's names, and ours.
ARGUMENTS = {
    "img_size": "input_size",
    "dynamic_img_size": "dynamic_size",
    "drop_rate": "head_dropout",
}


def registered_names() -> list[str]:
    """Return the names of our models in timm."""
    return [PREFIX + name for name in zoo.names()]


def build(
    entry: zoo.ModelEntry,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    features_only: bool = False,
    **arguments: Any,
) -> nn.Module:
    """Return a model as timm's users expect it: a classifier returns logits in both modes.

    Args:
        entry: The model.
        pretrained: Load weights.
        pretrained_cfg: Which weights: the tag of a checkpoint, or timm's configuration of one.
        pretrained_cfg_overlay: Values that differ from that configuration, such as `file`.
        cache_dir: Not supported.
        features_only: Return a `FeatureBackbone`.
        arguments: Constructor arguments, by our names or timm's.

    Raises:
        UsageError: An argument is not supported.
        CheckpointError, HubError: See `create_model`.
    """
    if cache_dir is not None:
        raise UsageError("cache_dir is not supported", "set the environment variable HF_HUB_CACHE")
    arguments = {ARGUMENTS.get(name, name): value for name, value in arguments.items()}
    if isinstance(size := arguments.get("input_size"), int):
        frames = entry.config["input_size"][:-2]
        arguments["input_size"] = (*frames, size, size)
    if arguments.pop("global_pool", "avg") != "avg":
        raise UsageError("global_pool is not 'avg'", "all Hieras take the mean over tokens")
    if entry.family == "hieradet" and not features_only and arguments.get("num_classes"):
        raise UsageError(
            f"num_classes is {arguments['num_classes']!r:.60}, and {entry.name} has no classes",
            "use 0, or features_only=True",
        )
    if entry.family == "hieradet" or features_only:  # there is no head
        arguments.pop("num_classes", None)
    checkpoint = arguments.pop("checkpoint", None)
    if checkpoint is None and pretrained:
        checkpoint = _checkpoint_of(entry, pretrained_cfg, pretrained_cfg_overlay or {})
    model = create_model(
        entry.name, pretrained, checkpoint, features_only=features_only, **arguments
    )
    if isinstance(model, Hiera):
        model.return_logits()
    return model


def _checkpoint_of(
    entry: zoo.ModelEntry, cfg: Any, overlay: Mapping[str, Any]
) -> str | Path | None:
    """Return the tag or the file of the weights that timm asks for; None for the default."""
    if cfg is None or isinstance(cfg, str):
        values: Mapping[str, Any] = {"tag": cfg}
    else:
        values = cfg if isinstance(cfg, Mapping) else vars(cfg)
    return _location(entry, overlay) or _location(entry, values)


def _location(entry: zoo.ModelEntry, values: Mapping[str, Any]) -> str | Path | None:
    """Return what a configuration of timm says about where weights are, or None.

    Our own configurations name a tag, and where timm would look for it.
    """
    tag, file = values.get("tag"), values.get("file")
    if tag in entry.checkpoints:
        return str(tag)
    return file or values.get("hf_hub_id") or values.get("url") or tag or None


def _default_cfgs() -> dict[str, Any]:
    """Return timm's configurations of all checkpoints, the default of each model first."""
    found: dict[str, Any] = {}
    for entry in zoo.models().values():
        classes = entry.config.get("num_classes", 0) if not entry.autoencoder else 0
        steps = entry.preprocessing
        shared = {
            "input_size": (entry.config.get("in_chans", 3), *entry.config["input_size"]),
            "num_classes": classes,
            "mean": tuple(steps["mean"]),
            "std": tuple(steps["std"]),
            "interpolation": steps["interpolation"],
            "crop_pct": min(steps["size"]) / steps["resize"],
            "first_conv": "patch_embed.proj",
            "classifier": "head.projection",
            "fixed_input_size": not _takes_any_size(entry),
            "license": entry.licence.lower(),
        }
        if not entry.checkpoints:
            found[PREFIX + entry.name] = shared
        for tag, checkpoint in entry.checkpoints.items():
            bundled = checkpoint.bundled_path
            where = {"file": str(bundled)} if bundled else {"hf_hub_id": checkpoint.hub}
            found[f"{PREFIX}{entry.name}.{tag}"] = {**shared, **where}
    return found


def _takes_any_size(entry: zoo.ModelEntry) -> bool:
    """Return whether a model takes inputs of other sizes without being asked."""
    return entry.family == "hieradet" or bool(entry.config.get("abs_win_pos_embed"))


def _entry_point(entry: zoo.ModelEntry) -> Callable[..., nn.Module]:
    """Return the function that timm calls for a model."""

    def function(**arguments: Any) -> nn.Module:
        return build(entry, **arguments)

    function.__name__ = function.__qualname__ = PREFIX + entry.name
    function.__doc__ = f"Build {entry.name} of hiera_core."
    return function


default_cfgs = generate_default_cfgs(_default_cfgs())  # timm looks for this name in the module
for _entry in zoo.models().values():
    register_model(_entry_point(_entry))
