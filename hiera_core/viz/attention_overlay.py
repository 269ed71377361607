"""Attention weights as pictures: where the heads of a block look, drawn over the input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from .grid import captioned_grid

MAX_HEADS = 8  # heads that are drawn
LIGHT = (255, 60, 30)  # colour of the largest weight


def draw_attention(
    weights: torch.Tensor, key_grid: Sequence[int], frames: np.ndarray
) -> Image.Image:
    """Draw an input beside the attention of each head: the mean over all queries, so that a cell is
    bright if many look at it.

    Args:
        weights: [heads, queries, keys] in row-major grid order.
        key_grid: Grid of the keys, [y, x], or [t, y, x] for video.
        frames: The input in 0..255: [t, height, width, 3], with one frame for an image. For a
            video, a row is drawn for each step of the grid in time.
    """
    shown = frames.round().clip(0, 255).astype(np.uint8)
    seen = weights[:MAX_HEADS].float().mean(1)
    *time, y, x = key_grid
    seen = seen.reshape(len(seen), *(time or [1]), y, x)
    steps = seen.shape[1]
    strip = shown[:: max(1, len(shown) // steps)][:steps]
    rows = [
        [picture, *(_overlay(picture, head[step]) for head in seen)]
        for step, picture in enumerate(strip)
    ]
    return captioned_grid(rows, columns=["input", *(f"head {i + 1}" for i in range(len(seen)))])


def _overlay(picture: np.ndarray, weights: torch.Tensor) -> np.ndarray:
    """Draw weights [y, x] over a picture, uint8 [height, width, 3]: the smallest is transparent,
    the largest opaque."""
    share = (weights - weights.min()) / (weights.max() - weights.min()).clamp_min(1e-12)
    cells = Image.fromarray(share.mul(255).round().to(torch.uint8).cpu().numpy())
    height, width = picture.shape[:2]
    alpha = np.asarray(cells.resize((width, height), Image.Resampling.BILINEAR))[..., None] / 255
    grey = picture.mean(-1, keepdims=True).repeat(3, -1) * 0.6
    mixed = grey * (1 - alpha) + np.array(LIGHT) * alpha
    return mixed.round().astype(np.uint8)
