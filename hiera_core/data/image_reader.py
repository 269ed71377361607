"""Read image files of any mode as upright 8-bit RGB. Damaged or oversized files are refused."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image, ImageFile, ImageOps, JpegImagePlugin

from ..errors import InputError, first_line
from .deep_grey import SCALED, deep_grey_to_rgb, is_deep_grey
from .image_formats import open_header

MAX_PIXELS = 178_956_970  # the size at which Pillow raises its decompression bomb error
BACKGROUND = (255, 255, 255)  # colour behind transparent pixels
LARGE_PIXELS = 32_000_000  # images with more are decoded one at a time, to limit the peak of memory
MAX_COUNTED_PAGES = 1000  # of a TIFF file, because each further page takes longer to find
INCOMPLETE = "the file is incomplete; download or copy it again"
UNPROCESSED = re.compile(r" \(\d+ bytes not processed\)")  # of no use to a reader
DAMAGED = "the file is damaged, or not an image"
# Messages for errors whose own text does not help. The others are quoted.
REASONS = {
    "MemoryError": "too large for this machine's memory",
}

_large_images = threading.Lock()  # held while a large image is decoded


def open_image(
    source: str | Path | bytes,
    max_pixels: int = MAX_PIXELS,
    enough_pixels: Callable[[int, int], tuple[int, int]] | None = None,
) -> tuple[Image.Image, list[str]]:
    """Decode an image to upright 8-bit RGB.

    Args:
        source: A path, or the bytes of the file.
        max_pixels: An image with more pixels is refused, before any of them is decoded.
        enough_pixels: Returns, for the width and height of an image, a size that is large enough.
            A JPEG file is then decoded to that size or more: a half, a quarter or an eighth of its
            own. This saves time, and changes the pixels a little.

    Returns:
        The image, with the `format` of its file, and notes for its record: how it was converted, or
        that it is the first of several frames.

    Raises:
        InputError: The file is missing, damaged, truncated, too large, or not an image.
    """
    notes: list[str] = []
    name = "" if isinstance(source, bytes) else str(source)
    with (
        as_input_errors(),
        open_file(source) as file,
        open_header(file, name, max_pixels) as image,
    ):
        if count := _count_frames(image):
            notes.append(f"first of {count} frames")
        large = image.width * image.height > LARGE_PIXELS
        if enough_pixels is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            image.draft(None, enough_pixels(*image.size))
        with _large_images if large else contextlib.nullcontext():
            image.load()
            upright = to_upright_rgb(image, notes)
        upright.format = image.format
        return upright, notes


@contextlib.contextmanager
def as_input_errors() -> Iterator[None]:
    """Convert whatever Pillow and the file system raise within the block to an InputError."""
    try:
        yield
    except InputError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError((error.strerror or str(error)).lower(), "check the path") from error
    except Image.DecompressionBombError as error:  # from readers that apply it in any case
        raise InputError(
            "more pixels than Pillow opens in this format", "convert it to PNG"
        ) from error
    except Exception as error:  # Pillow raises a dozen types on damaged files
        reason = REASONS.get(type(error).__name__) or UNPROCESSED.sub("", first_line(error))
        hint = DAMAGED if "truncated" not in reason.lower() else INCOMPLETE
        raise InputError(reason, hint) from error


def to_upright_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Apply an image's EXIF orientation, and convert it to RGB; see `to_rgb`."""
    if SCALED in image.info:
        notes.append(str(image.info[SCALED]))
    return to_rgb(_apply_orientation(image, notes), notes)


def to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Convert an image of any mode to RGB, and add to `notes` how it was done.

    Transparent pixels are composited on white. Grey values of more than 8 bits are scaled.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if is_deep_grey(image):
        return deep_grey_to_rgb(image, notes)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if image.mode == "La":  # Pillow has no direct way
            image = image.convert("LA")
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = rgba.getchannel("A")
        if alpha.getextrema() != (255, 255):
            notes.append("transparency composited on white")
        canvas = Image.new("RGB", rgba.size, BACKGROUND)
        canvas.paste(rgba, mask=alpha)
        return canvas
    return image.convert("RGB")


def open_file(source: str | Path | bytes) -> IO[bytes]:
    """Open a file or its bytes.

    Raises:
        InputError: It is empty.
        OSError: It cannot be read.
    """
    if isinstance(source, bytes):
        file: IO[bytes] = io.BytesIO(source)
    else:
        file = Path(source).open("rb")  # noqa: SIM115 (the caller closes it)
    if not file.read(1):
        file.close()
        raise InputError("empty file", DAMAGED)
    file.seek(0)
    return file


def _count_frames(image: ImageFile.ImageFile) -> str:
    """Return the number of frames of an animation, or "" for a still image.

    The image is left at its first frame.
    """
    if image.format == "MPO":  # holds variants of one photo, not frames
        return ""
    try:
        if image.format == "TIFF":
            return _count_pages(image)
        count = int(getattr(image, "n_frames", 1))
        return str(count) if count > 1 else ""
    except Exception:  # counting reads the later frames; only the first has to be intact
        return ""
    finally:
        with contextlib.suppress(Exception):
            image.seek(0)


def _count_pages(image: ImageFile.ImageFile) -> str:
    """Return the number of pages of a TIFF file, as `_count_frames` does."""
    for count in range(1, MAX_COUNTED_PAGES + 1):
        try:
            image.seek(count)
        except EOFError:
            return str(count) if count > 1 else ""
    return f"more than {MAX_COUNTED_PAGES}"


def _apply_orientation(image: Image.Image, notes: list[str]) -> Image.Image:
    """Rotate or flip the image by its EXIF orientation, if the EXIF block can be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation in range(2, 9):
            return ImageOps.exif_transpose(image)
    except Exception:  # EXIF parsing raises many types, and the pixels do not depend on it
        notes.append("damaged EXIF ignored")
    return image
