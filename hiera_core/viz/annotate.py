"""Pictures of results: a picture with its classes below it, a video as a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..atomic import atomic_file
from ..records import Prediction, Record
from .output_paths import output_path

LONG_SIDE = 640  # of an annotated picture, in pixels
MIN_WIDTH = 320  # so that labels fit
TILE = 192  # height of a frame on a contact sheet
MAX_TILES = 60
COLUMNS = 6
INK, PAPER, BAR = (20, 20, 20), (255, 255, 255), (150, 190, 230)
LINE, MARGIN = 20, 6
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


@dataclass(frozen=True)
class Thumbnail:
    """A picture of an input, small; from a video, at a time, with its class where it has one."""

    picture: Image.Image
    seconds: float | None = None
    guess: Prediction | None = None


@dataclass
class Thumbnails:
    """An input's shots: at most `MAX_TILES`, evenly spread, however many come."""

    kept: list[Thumbnail] = field(default_factory=list)
    _step: int = 1
    _seen: int = 0

    def add(self, pixels: np.ndarray, seconds: float, guess: Prediction | None = None) -> None:
        """A video frame [height, width, 3] in 0..255."""
        if self._seen % self._step == 0:
            image = Image.fromarray(np.asarray(pixels).round().clip(0, 255).astype(np.uint8))
            image.thumbnail((3 * TILE, TILE))
            self.kept.append(Thumbnail(image, seconds, guess))
        self._seen += 1
        if len(self.kept) > MAX_TILES:
            self.kept, self._step = self.kept[::2], 2 * self._step


def make_thumbnail(image: Image.Image) -> Thumbnail:
    """A picture, no larger than it is shown."""
    small = image.copy() if max(image.size) <= LONG_SIDE else image
    if small is image:
        scale = LONG_SIDE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return Thumbnail(small)


def draw_record(record: Record) -> Image.Image:
    """The annotated picture or contact sheet of a record that has shots."""
    shots = record.thumbnails
    if record.kind == "image":
        return _with_classes(shots[0].picture, record.topk)
    return _with_classes(_sheet(shots), record.topk)


def save_annotated(record: Record, folder: Path) -> Path:
    """Draw a record and write it below `folder`, whole or not at all; see `mirror.target`.

    Raises:
        OutputError: it cannot be written.
    """
    path = output_path(folder, record.input, ".png", FORMATS if record.kind == "image" else ())
    with atomic_file(path) as temporary:
        draw_record(record).save(temporary, FORMATS[path.suffix.lower()], quality=90)
    return path


def _with_classes(picture: Image.Image, topk: Sequence[Prediction]) -> Image.Image:
    """Bars and labels below a picture."""
    width = max(picture.width, MIN_WIDTH)
    canvas = Image.new("RGB", (width, picture.height + LINE * len(topk) + 2 * MARGIN), PAPER)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for row, guess in enumerate(topk):
        top = picture.height + MARGIN + row * LINE
        end = MARGIN + (width - 2 * MARGIN) * guess.prob
        pen.rectangle((MARGIN, top + 1, end, top + LINE - 2), fill=BAR)
        text = f"{guess.prob:6.1%}  {guess.label if guess.label is not None else guess.id}"
        pen.text((MARGIN + 2, top + 1), text, INK, font)
    return canvas


def _sheet(shots: Sequence[Thumbnail]) -> Image.Image:
    """Frames in rows, each with its time and class below it."""
    columns = min(COLUMNS, len(shots)) if len(shots) > COLUMNS else len(shots)
    width = max(shot.picture.width for shot in shots)
    height = max(shot.picture.height for shot in shots)
    rows = math.ceil(len(shots) / columns)
    cell = (width + MARGIN, height + LINE + MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, shot in enumerate(shots):
        left, top = MARGIN + place % columns * cell[0], MARGIN + place // columns * cell[1]
        sheet.paste(shot.picture, (left, top))
        text = f"{shot.seconds:.1f} s" if shot.seconds is not None else ""
        if shot.guess is not None:
            text += f"  {shot.guess.label or shot.guess.id} {shot.guess.prob:.0%}"
        while pen.textlength(text, font) > width and len(text) > 8:
            text = text[:-2] + "…"
        pen.text((left, top + height + 2), text, INK, font)
    return sheet
