"""How much of the device's arithmetic a training step uses."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ... import zoo
from ...models.factory import model_class
from ...models.masking import draw_units
from ..recipe import Recipe

log = logging.getLogger("hiera")
# Dense bf16 and fp16 operations per second of NVIDIA's GPUs, in 1e12, from their data sheets. The
# first name that is part of the device's counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "RTX 4090": 165,
    "V100": 125,
    "T4": 65,
}
BACKWARD = 2  # operations of the backward pass, as a multiple of those of the forward pass


def training_flops(recipe: Recipe, num_classes: int | None) -> int | None:
    """Return the number of operations for one view in training: forward and backward.

    What activation checkpointing computes again does not count. The model is on the meta device,
    with eager attention, so nothing is computed, and the counter sees all of it. Returns None if
    they cannot be counted: only the log needs them, so the run goes on.

    Args:
        recipe: The recipe.
        num_classes: Number of classes; None for an autoencoder.
    """
    try:
        return (1 + BACKWARD) * _forward_flops(recipe, num_classes)
    except Exception as error:
        log.debug("the operations of a step cannot be counted (%s)", error)
        return None


def _forward_flops(recipe: Recipe, num_classes: int | None) -> int:
    """Return the number of operations in a forward pass of one view."""
    entry = zoo.get(recipe.model.name)
    config = {**entry.config, **recipe.model.config}
    if num_classes is not None:
        config["num_classes"] = num_classes
    with torch.device("meta"):
        model: Any = model_class(entry)(**config)
        model.set_attention("eager")
        channels = model.config["in_chans"]
        x = torch.empty(1, channels, *model.config["input_size"])
        arguments = {}
        if entry.autoencoder:
            windows = model.layout.windows
            arguments["keep_ids"] = draw_units(1, windows, recipe.mask_ratio, device=x.device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(x, **arguments)
    return counter.get_total_flops()


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Return how many operations per second the device can do, or None if that is not known: on a
    CPU, in fp32, and on GPUs that are not in the table."""
    if device.type != "cuda" or precision not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    # No letter or digit may follow: an L40 is no L4, and an RTX A1000 no A100.
    found = (peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"{part}(?![0-9A-Z])", name))
    return next((1e12 * peak for peak in found), None)
