"""What timm's tools read about a model: its preprocessing, classes, licence, and special layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...data.transforms import ImageTransform, VideoTransform
from ...errors import CheckpointError

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
    found |= _preprocessing(card.get("preprocessing"), tuple(input_size))
    if "licence" in card:
        found["license"] = str(card["licence"]).lower()
    if isinstance(card.get("classes"), list):
        found["label_names"] = card["classes"]
    return found


def _preprocessing(saved: object, input_size: tuple[int, ...]) -> dict[str, object]:
    """Return the preprocessing that a card holds, or nothing if it is not usable."""
    if not isinstance(saved, Mapping) or len(input_size) < 2:
        return {}
    kind = VideoTransform if len(input_size) == 3 else ImageTransform
    try:
        steps = kind.from_preprocessing(saved, input_size)
    except CheckpointError:
        return {}
    found: dict[str, object] = {"mean": steps.mean, "std": steps.std}
    if isinstance(steps, ImageTransform):
        found["interpolation"] = steps.interpolation
        found["crop_mode"] = CROP_MODES.get(steps.crop_mode, "center")
    if "size" in saved and "resize" in saved:
        found["crop_pct"] = min(map(int, saved["size"])) / int(saved["resize"])
    return found
