"""Order of the axes of maps, by timm's names."""

from __future__ import annotations

import torch

from ...errors import UsageError

# By name: whether channels come first, and the number of dimensions of the grid. NCHW and NHWC are
# timm's names and its default, so they are also accepted for videos and signals.
FORMATS = {
    "NCHW": (True, 2),
    "NHWC": (False, 2),
    "NCTHW": (True, 3),
    "NTHWC": (False, 3),
    "NCL": (True, 1),
    "NLC": (False, 1),
}


def channels_first(output_fmt: str, dims: int) -> bool:
    """Return whether the channels of a map come first in a format.

    Args:
        output_fmt: The name of the format.
        dims: Number of dimensions of the model's inputs: 2 for images, 3 for videos.

    Raises:
        UsageError: There is no such format, or it does not fit the model.
    """
    first, fits = FORMATS.get(output_fmt, (False, 0))
    if fits not in (dims, 2):
        usable = [name for name, (_, number) in FORMATS.items() if number in (dims, 2)]
        raise UsageError(f"output_fmt is {output_fmt!r:.60}", f"use {' or '.join(usable)}")
    return first


def arrange(x: torch.Tensor, first: bool) -> torch.Tensor:
    """Return a map in a format. [b, *grid, c] -> [b, c, *grid], or the same if not `first`"""
    return x.movedim(-1, 1) if first else x
