"""Input sizes as users write them. This module does not import torch."""

from __future__ import annotations

import re

from ..errors import UsageError


def parse_size(text: str) -> tuple[int, ...]:
    """Parse an input size: `384` -> (384,), `224x448` -> (224, 448).

    Raises:
        UsageError: The text is not one to three numbers with an x between them.
    """
    if not re.fullmatch(r"\d{1,6}(x\d{1,6}){0,2}", text):
        raise UsageError(
            f"{text!r} is no size", "write 384 or 224x448 (y, x); for video 16x256 or 16x224x288"
        )
    return tuple(map(int, text.split("x")))


def full_size(size: tuple[int, ...], dims: int) -> tuple[int, ...]:
    """Return a size with `dims` numbers. A single side stands for height and width.

    Raises:
        UsageError: There are too few or too many numbers.
    """
    full = (*size, size[-1]) if len(size) == max(dims - 1, 1) and dims > 1 else size
    if len(full) != dims:
        shapes = {1: "the number of samples", 2: "384 or 224x448", 3: "16x256 or 16x224x288"}
        raise UsageError(
            f"size {'x'.join(map(str, size))} does not fit a model of {dims} dimensions",
            f"write {shapes[dims]}",
        )
    return full
