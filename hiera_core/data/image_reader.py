"""Pictures to model input: open safely, convert honestly, resize and crop as the reference does."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..errors import InputError, first_line

# Content decides, and only these are opened. Pillow's other readers are old, call programs, or
# (TGA) take any bytes for a picture.
FORMATS = [
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "ICO",
    "QOI",
]
MAX_PIXELS = 178_956_970  # 179 M, where Pillow too calls a picture a decompression bomb
BACKGROUND = (255, 255, 255)  # what shows through transparent pixels


def open_image(
    source: str | Path | bytes, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, list[str]]:
    """Decode a picture to 8-bit RGB, upright, and say what was done to it.

    Args:
        source: a path, or the file's bytes.
        max_pixels: larger pictures are refused by their header, before decoding.

    Returns:
        The picture and notes for its record (transparency, first frame of several, ...).

    Raises:
        InputError: missing, no picture, damaged, truncated, or too large.
    """
    notes: list[str] = []
    try:
        with _opened(source) as image:
            if image.width * image.height > max_pixels:
                raise InputError(
                    f"{image.width}x{image.height} pixels are more than {max_pixels}",
                    "raise --max-pixels if you trust it",
                )
            frames = _frames(image)
            if frames > 1:
                notes.append(f"first of {frames} frames")
            image.load()
            return to_rgb(_upright(image, notes), notes), notes
    except InputError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError((error.strerror or str(error)).lower(), "check the path") from error
    except Exception as error:  # Pillow raises a dozen types on damaged files
        raise InputError(
            REASONS.get(type(error).__name__) or first_line(error),
            "the file is damaged or not a picture",
        ) from error


@contextlib.contextmanager
def without_pillow_limit() -> Iterator[None]:
    """Let `open_image`'s own limit stand alone: Pillow's would warn below it and cap it above."""
    with _limit_lock:
        _limit_users[0] += 1
        if _limit_users[0] == 1:
            _limit_users[1], Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        with _limit_lock:
            _limit_users[0] -= 1
            if _limit_users[0] == 0:
                Image.MAX_IMAGE_PIXELS = _limit_users[1]


_limit_lock = threading.Lock()
_limit_users: list[Any] = [0, None]  # how many streams run, and Pillow's own limit


def to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Any mode to RGB: deep pictures scaled by their range, transparency composited on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_to_rgb(image, notes)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        if alpha.getextrema() != (255, 255):
            notes.append("transparency composited on white")
        canvas = Image.new("RGB", rgba.size, BACKGROUND)
        canvas.paste(rgba, mask=alpha)
        return canvas
    return image.convert("RGB")


def _deep_to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """16-bit, 32-bit and float grey by the type's range (Pillow alone would clip them to white).

    Pillow holds some 16-bit files in its 32-bit mode, so values up to 65,535 count as 16-bit.
    Floats have no range of their own: [0, 1] is taken as is, anything else by its extremes.
    """
    values = np.asarray(image)
    low, high = 0.0, 65535.0
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise InputError("float picture holds NaN or infinity", "clean it first")
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        else:
            notes.append(f"float values scaled from {low:g}..{high:g}")
    elif image.mode == "I" and values.max(initial=0) > 65535:
        high = 2.0**31 - 1
    grey = np.empty(values.shape, np.uint8)
    for row, line in enumerate(values):  # row by row: as float64 a whole picture is large
        scaled = (line.astype(np.float64) - low) / max(high - low, 1e-12)
        grey[row] = scaled.clip(0, 1) * 255 + 0.5
    notes.append(f"{'float' if image.mode == 'F' else 'deep'} grey scaled to 8 bits")
    return Image.fromarray(grey).convert("RGB")


def _opened(source: str | Path | bytes) -> Image.Image:
    if isinstance(source, bytes):
        if not source:
            raise InputError("empty file", "the file is damaged or not a picture")
        return Image.open(io.BytesIO(source), formats=_formats())
    path = Path(source)
    if path.is_file() and path.stat().st_size == 0:
        raise InputError("empty file", "the file is damaged or not a picture")
    return Image.open(path, formats=_formats())


@functools.cache
def _formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _frames(image: Image.Image) -> int:
    """Frames of an animation. A phone's MPO holds variants of one picture, not frames."""
    if image.format == "MPO":
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # counting reads later frames, which may be damaged; the first is used
        return 1
    finally:
        with contextlib.suppress(Exception):
            image.seek(0)


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    """Apply the camera's orientation; a damaged EXIF block counts as none."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation in range(2, 9):
            return ImageOps.exif_transpose(image)
    except Exception:  # EXIF parsing raises many types, and pixels do not depend on it
        notes.append("damaged EXIF ignored")
    return image


REASONS = {
    "UnidentifiedImageError": "not a picture in a format that is read here",
    "MemoryError": "too large for this machine's memory",
}
