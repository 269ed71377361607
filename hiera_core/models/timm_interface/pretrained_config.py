"""What timm's tools read about a model: its preprocessing, classes, licence, and special layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CROP_MODES = {"squash": "squash"}  # ours: timm's; all others are timm's "center"


def pretrained_config(
    card: Mapping[str, Any],
    input_size: Sequence[int],
    in_chans: int,
    num_classes: int,
    fixed_size: bool,
) -> dict[str, object]:
    """Return timm's `pretrained_cfg` of a model.

    `timm.data.resolve_data_config({}, model=model)` then returns the preprocessing of the model.

    Args:
        card: Metadata of the model, see `PretrainedMixin.card`.
        input_size: Size of its inputs.
        in_chans: Their channels.
        num_classes: Its number of classes.
        fixed_size: Whether it takes no other size.
    """
    found: dict[str, object] = {
        "architecture": card.get("model", ""),
        "input_size": (in_chans, *input_size),
        "fixed_input_size": fixed_size,
        "num_classes": num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head.projection" if num_classes else None,
    }
    steps = card.get("preprocessing") or {}
    found |= {name: tuple(steps[name]) for name in ("mean", "std") if name in steps}
    if "interpolation" in steps:
        found["interpolation"] = steps["interpolation"]
    if steps.get("resize") and steps.get("size"):
        found["crop_pct"] = min(steps["size"]) / steps["resize"]
        found["crop_mode"] = CROP_MODES.get(steps.get("crop_mode", ""), "center")
    if "licence" in card:
        found["license"] = str(card["licence"]).lower()
    if isinstance(card.get("classes"), list):
        found["label_names"] = card["classes"]
    return found
