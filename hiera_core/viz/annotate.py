"""Draw annotated inputs: an image, or a contact sheet of a video, above bars of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from ..records import Prediction, Record
from .grid import GAP, LINE, PAPER, captioned_grid, draw_lines, enlargement, wrap_text

LONG_SIDE = 640  # longest side of an annotated image, in pixels
MIN_WIDTH = 320  # in pixels, so that labels have space
TILE = 192  # short side of a frame on a contact sheet, in pixels
MAX_TILES = 60
COLUMNS = 6
BAR = (150, 190, 230)  # colour
PERCENT = 60  # width of the probabilities, in pixels


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of an input. For a video, also its time and the class at that time."""

    picture: Image.Image
    seconds: float | None = None
    guess: Prediction | None = None


@dataclass
class Thumbnails:
    """The thumbnails of a video: at most `MAX_TILES`, evenly spread over all that are added."""

    kept: list[Thumbnail] = field(default_factory=list)
    _step: int = 1  # one frame in `_step` is kept
    _seen: int = 0

    def add(self, pixels: np.ndarray, seconds: float, guess: Prediction | None = None) -> None:
        """Add a frame of the video. If there are too many, every second thumbnail is dropped.

        Args:
            pixels: [height, width, 3] in 0..255.
            seconds: Time of the frame.
            guess: The class at that time.
        """
        if self._seen % self._step == 0:
            image = Image.fromarray(np.asarray(pixels).round().clip(0, 255).astype(np.uint8))
            is_wide = image.width >= image.height
            image.thumbnail((3 * TILE, TILE) if is_wide else (TILE, 3 * TILE))
            self.kept.append(Thumbnail(image, seconds, guess))
        self._seen += 1
        if len(self.kept) > MAX_TILES:
            self.kept, self._step = self.kept[::2], 2 * self._step


def make_thumbnail(image: Image.Image) -> Thumbnail:
    """Return a thumbnail of an image. The long side of the thumbnail is at most `LONG_SIDE`."""
    if max(image.size) <= LONG_SIDE:
        return Thumbnail(image.copy())
    scale = LONG_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return Thumbnail(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))


def draw_record(record: Record) -> Image.Image:
    """Draw the annotated image or contact sheet of a record that has thumbnails."""
    if record.kind == "image":
        return _with_classes(record.thumbnails[0].picture, record.topk)
    return _with_classes(_contact_sheet(record.thumbnails), record.topk)


def _with_classes(picture: Image.Image, topk: Sequence[Prediction]) -> Image.Image:
    """Draw a picture above a line for each class, with a bar as long as its probability. A small
    picture is enlarged, and a long name takes several lines."""
    factor = enlargement(picture.height, picture.width)
    picture = picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )
    width = max(picture.width, MIN_WIDTH)
    space = width - 2 * GAP
    labels = [
        wrap_text(str(g.label if g.label is not None else g.id), space - PERCENT - 4) for g in topk
    ]
    height = picture.height + LINE * sum(map(len, labels)) + 2 * GAP
    canvas = Image.new("RGB", (width, height), PAPER)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    pen, top = ImageDraw.Draw(canvas), picture.height + GAP
    for guess, lines in zip(topk, labels, strict=True):
        end = GAP + space * guess.prob
        pen.rectangle((GAP, top + 1, end, top + LINE * len(lines) - 2), fill=BAR)
        draw_lines(canvas, (GAP + 8, top + 1), [f"{guess.prob:.1%}"])
        draw_lines(canvas, (GAP + PERCENT, top + 1), lines)
        top += LINE * len(lines)
    return canvas


def _contact_sheet(thumbnails: Sequence[Thumbnail]) -> Image.Image:
    """Draw frames in rows, each above its time and class."""
    rows = [thumbnails[i : i + COLUMNS] for i in range(0, len(thumbnails), COLUMNS)]
    cells = [[np.asarray(thumbnail.picture) for thumbnail in row] for row in rows]
    captions = [[_caption(thumbnail) for thumbnail in row] for row in rows]
    return captioned_grid(cells, captions=captions)


def _caption(thumbnail: Thumbnail) -> str:
    text = f"{thumbnail.seconds:.1f} s" if thumbnail.seconds is not None else ""
    if thumbnail.guess is not None:  # the label comes last, because it may be shortened
        text += f"  {thumbnail.guess.prob:.0%} {thumbnail.guess.label or thumbnail.guess.id}"
    return text
