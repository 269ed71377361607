"""Feature maps as pictures: the first three principal components as red, green and blue."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image

from ..records import Kind
from .grid import captioned_grid


def draw_feature_maps(
    maps: Mapping[int, torch.Tensor], frames: np.ndarray, kind: Kind
) -> Image.Image:
    """Draw an input beside the principal components of its stage maps.

    Args:
        maps: The map of each stage (counted from 1): [y, x, c], or [t, y, x, c] for video.
        frames: The input in 0..255: [t, height, width, 3], with one frame for an image.
        kind: For a video, a strip of its frames is drawn above strips of the maps.
    """
    colours = {stage: pca_colours(values) for stage, values in maps.items()}
    sizes = {stage: "x".join(map(str, values.shape)) for stage, values in maps.items()}
    captions = ["input", *(f"stage {stage}, {sizes[stage]}" for stage in maps)]
    shown = frames.round().clip(0, 255).astype(np.uint8)
    size = (shown.shape[1], shown.shape[2])
    if kind == "image":
        cells = [shown[0], *(_enlarge(colours[stage], size) for stage in maps)]
        return captioned_grid([cells], columns=captions)
    count = next(iter(maps.values())).shape[0]
    strip = shown[:: len(shown) // count]  # the first frame of each token
    rows = [list(strip[:count])]
    rows += [[_enlarge(frame, size) for frame in colours[stage]] for stage in maps]
    return captioned_grid(rows, rows=captions)


def pca_colours(features: torch.Tensor) -> np.ndarray:
    """Return the first three principal components of a map as red, green and blue.

    Args:
        features: [*grid, c]. The components are computed over all cells, so that the frames of a
            video share their colours.

    Returns:
        uint8 [*grid, 3]. Each component is scaled from its 1st to its 99th percentile. The sign of
        a component is fixed: its largest weight is positive.
    """
    x = features.float().cpu().flatten(0, -2)
    x = x - x.mean(0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    directions = directions[:3]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    parts = x @ (directions * largest.sign()).T
    low, high = torch.quantile(parts, torch.tensor([0.01, 0.99]), dim=0)
    shown = ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).mul(255).round()
    three = torch.zeros(len(x), 3)
    three[:, : shown.shape[1]] = shown
    return three.to(torch.uint8).reshape(*features.shape[:-1], 3).numpy()


def _enlarge(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Draw the cells of a map as rectangles. uint8 [y, x, 3] -> uint8 [*size, 3]"""
    image = Image.fromarray(cells).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(image)
