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
MAX_LINES = 6  # of a caption
INK, PAPER = (20, 20, 20), (255, 255, 255)


def captioned_grid(
    cells: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Draw pictures in rows and columns, with captions, which are broken into lines where they are
    wider than their picture.

    Args:
        cells: Rows of pictures, uint8 [height, width, 3]. All are drawn at the size of the first,
            which is enlarged if it is small, so that single pixels show as squares.
        columns: A caption for each column, below the last row.
        rows: A caption for each row, above it.
        captions: A caption for each cell, below it.
    """
    height, width = cells[0][0].shape[:2]
    factor = enlargement(height, width)
    height, width = height * factor, width * factor
    cell_width = max(width, MIN_SIDE)  # leaves space for a caption below a narrow picture
    step_x = cell_width + GAP
    canvas_width = max(map(len, cells)) * step_x + GAP
    above = [wrap_text(text, canvas_width - 2 * GAP) for text in rows] or [[]] * len(cells)
    below = [[wrap_text(t, cell_width) for t in row] for row in captions] or [[]] * len(cells)
    footer = [wrap_text(text, cell_width) for text in columns]
    steps = [
        LINE * len(heading) + height + LINE * max(map(len, texts), default=0) + GAP
        for heading, texts in zip(above, below, strict=True)
    ]
    bottom = sum(steps) + GAP
    size = (canvas_width, bottom + LINE * max(map(len, footer), default=0))
    canvas = Image.new("RGB", size, PAPER)
    for y, row in enumerate(cells):
        top = GAP + sum(steps[:y])
        draw_lines(canvas, (GAP, top), above[y])
        for x, cell in enumerate(row):
            left, cell_top = GAP + x * step_x, top + LINE * len(above[y])
            picture = Image.fromarray(cell).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (left, cell_top))
            if captions:
                draw_lines(canvas, (left, cell_top + height + GAP // 2), below[y][x])
    for x, caption in enumerate(footer):
        draw_lines(canvas, (GAP + x * step_x, bottom - GAP // 2), caption)
    return canvas


def wrap_text(text: str, width: int) -> list[str]:
    """Return a text as lines of at most `width` pixels, broken between words, or within a word that
    is longer. A text of more than `MAX_LINES` lines is shortened to these."""
    pen, font = ImageDraw.Draw(Image.new("L", (1, 1))), _font()

    def fits(line: str) -> bool:
        return pen.textlength(line, font) <= width

    def fitting(word: str) -> int:
        """Return how many characters of a word fit on a line, at least one."""
        counts = range(2, len(word) + 1)
        return (
            bisect.bisect(counts, width, key=lambda n: math.ceil(pen.textlength(word[:n], font)))
            + 1
        )

    text = " ".join(text[: MAX_LINES * (width + 1)].split())  # a character is at least a pixel wide
    lines: list[str] = []
    rest = ""
    for word in text.split():
        joined = f"{rest} {word}" if rest else word
        if fits(joined):
            rest = joined
            continue
        lines += [rest] if rest else []
        while not fits(word) and len(word) > 1:
            count = fitting(word)
            lines.append(word[:count])
            word = word[count:]
        rest = word
    lines += [rest] if rest else []
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], _shorten(lines[MAX_LINES - 1] + "…", width)]
    return lines


def draw_lines(canvas: Image.Image, place: tuple[int, int], lines: Sequence[str]) -> None:
    """Draw lines of text, one below the other. `place` is the (left, top) of the first."""
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        pen.text((place[0], place[1] + number * LINE), line, INK, _font())


def _shorten(text: str, width: int) -> str:
    """Return a text with an ellipsis at its end if it is wider than `width` pixels."""
    pen, font = ImageDraw.Draw(Image.new("L", (1, 1))), _font()
    if pen.textlength(text, font) <= width:
        return text
    fits = bisect.bisect(
        range(len(text)), width, key=lambda n: math.ceil(pen.textlength(text[:n] + "…", font))
    )
    return text[: max(1, fits - 1)] + "…"


def side_by_side(clips: Sequence[np.ndarray]) -> np.ndarray:
    """Join clips into one, side by side. Their height and width must be even, for the encoder.

    n x uint8 [t, height, width, 3] -> uint8 [t, height', width', 3]
    """
    frames, height, width = clips[0].shape[:3]
    factor = enlargement(height, width)
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


def enlargement(height: int, width: int) -> int:
    """Return the integer factor by which a picture is enlarged, 1 for a large one."""
    wanted = -(-MIN_SIDE // min(height, width))
    return max(1, min(wanted, MAX_SIDE // max(height, width)))


@functools.cache
def _font() -> Any:
    return ImageFont.load_default(FONT_SIZE)
