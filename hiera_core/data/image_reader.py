"""Read image files of any mode as upright 8-bit RGB. Damaged or oversized files are refused."""

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

# Only these formats are opened, whatever the file extension is. Pillow's other readers are old,
# call external programs, or take any bytes for an image (TGA).
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
MAX_PIXELS = 178_956_970  # the size at which Pillow raises its decompression bomb error
BACKGROUND = (255, 255, 255)  # colour behind transparent pixels
REASONS = {
    "UnidentifiedImageError": "not a picture in a supported format",
    "MemoryError": "too large for this machine's memory",
}


def open_image(
    source: str | Path | bytes, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, list[str]]:
    """Decode an image to upright 8-bit RGB.

    Args:
        source: A path, or the bytes of the file.
        max_pixels: An image with more pixels is refused, before any of them is decoded.

    Returns:
        The image, and notes for its record: how it was converted, or that it is the first of
        several frames.

    Raises:
        InputError: The file is missing, damaged, truncated, too large, or not an image.
    """
    notes: list[str] = []
    try:
        with _open(source) as image:
            if image.width * image.height > max_pixels:
                raise InputError(
                    f"{image.width}x{image.height} pixels are more than {max_pixels}",
                    "raise --max-pixels if you trust it",
                )
            frames = _count_frames(image)
            if frames > 1:
                notes.append(f"first of {frames} frames")
            image.load()
            return to_rgb(_apply_orientation(image, notes), notes), notes
    except InputError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError((error.strerror or str(error)).lower(), "check the path") from error
    except Exception as error:  # Pillow raises a dozen types on damaged files
        raise InputError(
            REASONS.get(type(error).__name__) or first_line(error),
            "the file is damaged, or not an image",
        ) from error


@contextlib.contextmanager
def without_pillow_limit() -> Iterator[None]:
    """Disable Pillow's limit on pixels, so that only `max_pixels` of `open_image` applies.

    Pillow's limit would warn about smaller images, and refuse larger ones that the user allows.
    """
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
_limit_users: list[Any] = [0, None]  # number of open contexts, and Pillow's own limit


def to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Convert an image of any mode to RGB, and add to `notes` how it was done.

    Transparent pixels are composited on white. Grey values of more than 8 bits are scaled.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _scale_to_8_bits(image, notes)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        if alpha.getextrema() != (255, 255):
            notes.append("transparency composited on white")
        canvas = Image.new("RGB", rgba.size, BACKGROUND)
        canvas.paste(rgba, mask=alpha)
        return canvas
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image, notes: list[str]) -> Image.Image:
    """Convert 16-bit, 32-bit or float grey to RGB. Pillow alone would clip it to white.

    Integers are scaled by the range of their type. Pillow opens some 16-bit files in its 32-bit
    mode, so values up to 65,535 count as 16-bit. Floats within [0, 1] are taken as they are;
    others are scaled from their minimum to their maximum.
    """
    values = np.asarray(image)
    low, high = 0.0, 65535.0
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise InputError("float image holds NaN or infinity", "replace these values")
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        else:
            notes.append(f"float values scaled from {low:g}..{high:g}")
    elif image.mode == "I" and values.max(initial=0) > 65535:
        high = 2.0**31 - 1
    grey = np.empty(values.shape, np.uint8)
    for y, row in enumerate(values):  # one row at a time, because float64 takes a lot of memory
        scaled = (row.astype(np.float64) - low) / max(high - low, 1e-12)
        grey[y] = scaled.clip(0, 1) * 255 + 0.5
    depth = "float" if image.mode == "F" else "32-bit" if high > 65535 else "16-bit"
    notes.append(f"{depth} grey scaled to 8 bits")
    return Image.fromarray(grey).convert("RGB")


def _open(source: str | Path | bytes) -> Image.Image:
    hint = "the file is damaged, or not an image"
    if isinstance(source, bytes):
        if not source:
            raise InputError("empty file", hint)
        return Image.open(io.BytesIO(source), formats=_formats())
    path = Path(source)
    if path.is_file() and path.stat().st_size == 0:
        raise InputError("empty file", hint)
    return Image.open(path, formats=_formats())


@functools.cache
def _formats() -> list[str]:
    """Return those of FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _count_frames(image: Image.Image) -> int:
    """Return the number of frames of an animation, and leave the image at its first frame."""
    if image.format == "MPO":  # holds variants of one photo, not frames
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # counting reads the later frames; only the first has to be intact
        return 1
    finally:
        with contextlib.suppress(Exception):
            image.seek(0)


def _apply_orientation(image: Image.Image, notes: list[str]) -> Image.Image:
    """Rotate or flip the image by its EXIF orientation, if the EXIF block can be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation in range(2, 9):
            return ImageOps.exif_transpose(image)
    except Exception:  # EXIF parsing raises many types, and the pixels do not depend on it
        notes.append("damaged EXIF ignored")
    return image
