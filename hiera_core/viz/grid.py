"""Pictures side by side with captions: reconstructions, feature maps, frames of videos."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..atomic import atomic_file

# All sizes are in pixels. Pictures whose short side is below MIN_SIDE are enlarged by an integer
# factor, as long as their long side stays within MAX_SIDE.
MIN_SIDE, MAX_SIDE = 160, 640
GAP, LINE, FONT_SIZE = 6, 20, 14  # space between cells, height of a line of text, size of the font
INK, PAPER = (20, 20, 20), (255, 255, 255)


def captioned_grid(
    cells: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Draw pictures in rows and columns, with captions. A caption that is too long is shortened.

    Args:
        cells: Rows of pictures, uint8 [height, width, 3]. All are drawn at the size of the first,
            which is enlarged if it is small, so that single pixels show as squares.
        columns: A caption for each column, below the last row.
        rows: A caption for each row, above it.
        captions: A caption for each cell, below it.
    """
    height, width = cells[0][0].shape[:2]
    factor = _enlargement(height, width)
    height, width = height * factor, width * factor
    cell_width = max(width, MIN_SIDE)  # leaves space for a caption below a narrow picture
    above, below = LINE * bool(rows), LINE * bool(captions)
    step_x, step_y = cell_width + GAP, above + height + below + GAP
    bottom = len(cells) * step_y + GAP
    size = (max(map(len, cells)) * step_x + GAP, bottom + LINE * bool(columns))
    canvas = Image.new("RGB", size, PAPER)
    for y, row in enumerate(cells):
        top = GAP + y * step_y
        if rows:
            draw_text(canvas, (GAP, top), rows[y], canvas.width - 2 * GAP)
        for x, cell in enumerate(row):
            left, cell_top = GAP + x * step_x, top + above
            picture = Image.fromarray(cell).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (left, cell_top))
            if captions:
                place = (left, cell_top + height + GAP // 2)
                draw_text(canvas, place, captions[y][x], cell_width)
    for x, caption in enumerate(columns):
        draw_text(canvas, (GAP + x * step_x, bottom - GAP // 2), caption, cell_width)
    return canvas


def draw_text(canvas: Image.Image, place: tuple[int, int], text: str, width: int) -> None:
    """Draw a line of text, shortened to a width in pixels. `place` is its (left, top)."""
    pen, font = ImageDraw.Draw(canvas), _font()
    text = text[: width + 1].replace("\n", " ")  # a character is at least a pixel wide
    if pen.textlength(text, font) > width:

        def width_of(count: int) -> int:
            return math.ceil(pen.textlength(text[:count] + "…", font))

        fits = bisect.bisect(range(len(text)), width, key=width_of)
        text = text[: max(1, fits - 1)] + "…"
    pen.text(place, text, INK, font)


def side_by_side(clips: Sequence[np.ndarray]) -> np.ndarray:
    """Join clips into one, side by side. Their height and width must be even, for the encoder.

    n x uint8 [t, height, width, 3] -> uint8 [t, height', width', 3]
    """
    frames, height, width = clips[0].shape[:3]
    factor = _enlargement(height, width)
    enlarged = [clip.repeat(factor, axis=1).repeat(factor, axis=2) for clip in clips]
    gap = np.full((frames, factor * height, GAP, 3), PAPER, np.uint8)
    parts = [part for clip in enlarged for part in (gap, clip)]
    return np.concatenate(parts[1:], axis=2)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Convert pixels from [0, 1] to 8 bits, with the channels last.

    float [..., 3, height, width] -> uint8 [..., height, width, 3]
    """
    return x.movedim(-3, -1).mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    with atomic_file(path) as temporary:
        image.save(temporary, "PNG")


def _enlargement(height: int, width: int) -> int:
    """Return the integer factor by which a picture is enlarged."""
    wanted = -(-MIN_SIDE // min(height, width))
    return max(1, min(wanted, MAX_SIDE // max(height, width)))


@functools.cache
def _font() -> Any:
    return ImageFont.load_default(FONT_SIZE)
