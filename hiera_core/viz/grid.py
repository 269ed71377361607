"""Pictures set side by side: reconstructions, feature maps, frames of videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..atomic import atomic_file

SMALL = 160  # pictures with a shorter short side are enlarged, by a whole factor
INK, PAPER = (20, 20, 20), (255, 255, 255)
GAP, LINE = 6, 20  # pixels


def captioned_grid(
    cells: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> Image.Image:
    """Pictures in rows and columns, with captions.

    Args:
        cells: uint8 [height, width, 3]. All are shown at the size of the first, enlarged where that
            is small; single pixels stay squares.
        columns: a caption below each column.
        rows: a caption above each row.
    """
    height, width = cells[0][0].shape[:2]
    factor = _enlargement(height, width)
    size = (width * factor, height * factor)
    head, foot = LINE * bool(rows), LINE * bool(columns)
    step_x, step_y = size[0] + GAP, size[1] + GAP + head
    across = max(map(len, cells))
    canvas = Image.new("RGB", (across * step_x + GAP, len(cells) * step_y + GAP + foot), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for y, row in enumerate(cells):
        top = GAP + y * step_y
        if rows:
            pen.text((GAP, top), _fit(rows[y], canvas.width - GAP, pen, font), INK, font)
        for x, cell in enumerate(row):
            shown = Image.fromarray(cell).resize(size, Image.Resampling.NEAREST)
            canvas.paste(shown, (GAP + x * step_x, top + head))
    for x, caption in enumerate(columns):
        place = (GAP + x * step_x, len(cells) * step_y + GAP // 2)
        pen.text(place, _fit(caption, size[0], pen, font), INK, font)
    return canvas


def side_by_side(clips: Sequence[np.ndarray]) -> np.ndarray:
    """Clips of even size side by side. n x uint8 [t, height, width, 3] -> [t, height, wide, 3]"""
    frames, height, width = clips[0].shape[:3]
    factor = _enlargement(height, width)
    large = [clip.repeat(factor, axis=1).repeat(factor, axis=2) for clip in clips]
    gap = np.full((frames, factor * height, GAP, 3), PAPER, np.uint8)
    parts = [part for clip in large for part in (gap, clip)]
    return np.concatenate(parts[1:], axis=2)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Float [..., 3, height, width] in [0, 1] -> uint8 [..., height, width, 3]; clipped."""
    return x.movedim(-3, -1).mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_file(path) as temporary:
        image.save(temporary, "PNG")


def _enlargement(height: int, width: int) -> int:
    return -(-SMALL // min(height, width))


def _fit(text: str, width: int, pen: ImageDraw.ImageDraw, font: Any) -> str:
    """Shortened to a width in pixels."""
    while pen.textlength(text, font) > width and len(text) > 2:
        text = text.removesuffix("…")[:-1] + "…"
    return text
