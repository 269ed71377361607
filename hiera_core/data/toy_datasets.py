"""Toy data sets that need no download. The bundled models are trained on them.

`digits`: scikit-learn's 1,797 handwritten digits (UCI optdigits, CC BY 4.0), enlarged to 32x32.
`shapes`: clips that are drawn here. One shape glides in a direction, which is the class. A second
shape of the same kind jumps between the same number of positions, on a line at right angles to
that direction. A single frame does not show the class, and neither do all frames in an unknown
order: only motion does.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .. import zoo
from ..errors import UsageError
from ..records import Kind
from .sources import Source
from .video_files.video_writer import encode

DIGITS = tuple("zero one two three four five six seven eight nine".split())
DIRECTIONS = ("moving right", "moving left", "moving down", "moving up")
BUNDLED = {"digits": "hiera_nano_32", "shapes": "hiera_nano_8x32"}  # model for each data set
DIGIT_SIDE = 32  # pixels
CLIPS = 4000
FRAMES, RATE, SIDE = 8, 4, 48  # frames of a clip, frames per second, pixels along a side
OVERSAMPLING = 4  # clips are drawn larger and reduced, for smooth edges and subpixel positions


class Digits(Sequence[Source]):
    """The digits as PNG files in memory.

    Raises:
        UsageError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UsageError(
                "the data set 'digits' comes with scikit-learn, which is not installed",
                "pip install scikit-learn",
            ) from error
        bunch = load_digits()
        self.images, self.labels = bunch.images, bunch.target.astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Source:  # type: ignore[override]
        small = Image.fromarray((self.images[index] * (255 / 16)).astype(np.uint8))
        image = small.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return Source(f"digits/{index:04}.png", data=file.getvalue())


class Shapes(Sequence[Source]):
    """Clips of moving shapes as MP4 files in memory. The index of a clip seeds its random draws."""

    labels = np.arange(CLIPS, dtype=np.int64) % len(DIRECTIONS)

    def __len__(self) -> int:
        return CLIPS

    def __getitem__(self, index: int) -> Source:  # type: ignore[override]
        return Source(f"shapes/{index:04}.mp4", data=_clip_file(range(CLIPS)[index]))


@functools.lru_cache(maxsize=CLIPS)
def _clip_file(index: int) -> bytes:
    clip = draw_clip(int(Shapes.labels[index]), np.random.default_rng((7, index)))
    return encode(clip, RATE)


def draw_clip(direction: int, random: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """Return a clip in which a shape moves in one of DIRECTIONS.

    Args:
        direction: Index into DIRECTIONS.
        random: Generator of colours, shape, size, speed and positions.
        side: Height and width of the clip, in pixels.

    Returns:
        uint8 [FRAMES, side, side, 3].
    """
    background, ink = random.integers(0, 90, 3), random.integers(150, 256, 3)
    radius, step = random.uniform(4.5, 6.5), random.uniform(2.4, 3.0)
    draw = (_disc, _square, _triangle)[random.integers(3)]
    path = (np.arange(FRAMES) - (FRAMES - 1) / 2) * step
    order = _jump_orders()[random.integers(len(_jump_orders()))]
    reach = path[-1] + radius
    along = random.uniform(reach, SIDE - reach, 2)  # centres of both paths
    across = random.uniform(radius, SIDE - radius, 2)
    glide = along[0] + (path if direction % 2 == 0 else path[::-1])
    jump = along[1] + path[order]
    scale = side / SIDE * OVERSAMPLING
    frames = []
    for k in range(FRAMES):
        image = Image.new("RGB", (round(side * OVERSAMPLING),) * 2, tuple(map(int, background)))
        for x, y in [(glide[k], across[0]), (across[1], jump[k])]:
            centre = (x, y) if direction < 2 else (y, x)
            draw(ImageDraw.Draw(image), centre, radius, scale, tuple(map(int, ink)))
        frames.append(np.asarray(image.resize((side, side), Image.Resampling.BOX)))
    return np.stack(frames)


@functools.cache
def _jump_orders() -> np.ndarray:
    """Return the orders of the positions on a line that have only long jumps and little drift.

    -> [n, FRAMES]
    """
    orders = np.array(list(itertools.permutations(range(FRAMES))))
    has_long_jumps = np.abs(np.diff(orders, axis=1)).min(1) >= 3
    drift = orders @ (np.arange(FRAMES) - (FRAMES - 1) / 2)
    return orders[has_long_jumps & (np.abs(drift) < 0.3 * drift.max())]


def sample(kind: Kind) -> Source:
    """Return a bundled input to try a model on: a photo of a cat, or a clip of `shapes`."""
    name = "cat.jpg" if kind == "image" else "moving_right.mp4"
    title = "sample picture" if kind == "image" else "sample clip"
    return Source(title, path=zoo.ASSETS / "samples" / name)


def _disc(
    draw: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, scale: float, ink: object
) -> None:
    x, y = centre
    draw.ellipse([scale * v for v in (x - radius, y - radius, x + radius, y + radius)], fill=ink)  # type: ignore[arg-type]


def _square(
    draw: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, scale: float, ink: object
) -> None:
    x, y, r = *centre, radius * 0.9
    draw.rectangle([scale * v for v in (x - r, y - r, x + r, y + r)], fill=ink)  # type: ignore[arg-type]


def _triangle(
    draw: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, scale: float, ink: object
) -> None:
    # It points up in every class: an arrow in the direction of motion would show the class.
    x, y, r = *centre, radius
    corners = [(x - r, y + r), (x + r, y + r), (x, y - r)]
    draw.polygon([(scale * a, scale * b) for a, b in corners], fill=ink)  # type: ignore[arg-type]
