"""Pictures to model input: open safely, convert honestly, resize and crop as the reference does."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from .. import zoo
from ..errors import CheckpointError, InputError

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
MAX_WHOLE_RESIZE = 4  # long side, in short sides, up to which a picture is resized as a whole
BACKGROUND = (255, 255, 255)  # what shows through transparent pixels


@dataclass(frozen=True)
class ImageTransform:
    """Evaluation preprocessing: short side to `resize`, centre crop of `size`, normalise.

    Args:
        size: height and width the model takes, in pixels.
        resize: short side before the crop, in pixels.
        mean, std: of channels scaled to [0, 1].
        interpolation: `bicubic` or `bilinear`, both with antialias.
    """

    size: tuple[int, int]
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"

    @classmethod
    def from_card(
        cls, preprocessing: Mapping[str, Any] | None, input_size: tuple[int, ...]
    ) -> ImageTransform:
        """A model's own preprocessing, scaled to its input size where that differs.

        Raises:
            CheckpointError: hiera.json holds something else.
        """
        known = {**zoo.get(zoo.DEFAULT_IMAGE_MODEL).preprocessing, **(preprocessing or {})}
        height, width = input_size[-2:]
        try:
            resize, size = int(known["resize"]), tuple(map(int, known["size"]))
            mean, std = tuple(map(float, known["mean"])), tuple(map(float, known["std"]))
            interpolation = Image.Resampling[str(known["interpolation"]).upper()].name.lower()
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"preprocessing in hiera.json is not usable ({error})") from error
        if (height, width) != size:
            # The reference's ratio of 256 to 224, whatever the size.
            resize = round(min(height, width) * resize / min(size))
        return cls((height, width), max(resize, min(height, width)), mean, std, interpolation)

    def crop(self, image: Image.Image) -> np.ndarray:
        """Resize and centre-crop. -> uint8 [height, width, 3]

        Of a very long picture only the pixels that the crop needs are resampled, so that 20000x1
        costs no more than any other; the result is the same but for rounding.
        """
        (height, width), (w, h) = self.size, image.size
        new_w, new_h = _scaled(w, h, self.resize)
        if new_w < width or new_h < height:  # a crop wider than the short side: fill it
            grow = max(width / new_w, height / new_h)
            new_w, new_h = max(width, round(new_w * grow)), max(height, round(new_h * grow))
        left, top = round((new_w - width) / 2), round((new_h - height) / 2)
        resampling = Image.Resampling[self.interpolation.upper()]
        if max(new_w, new_h) <= MAX_WHOLE_RESIZE * self.resize:
            resized = image.resize((new_w, new_h), resampling)
            return np.array(resized.crop((left, top, left + width, top + height)))
        x, y = w / new_w, h / new_h  # source pixels for each pixel of the resized picture
        box = (left * x, top * y, min((left + width) * x, w), min((top + height) * y, h))
        return np.array(image.resize((width, height), resampling, box=box))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [b, height, width, 3] -> float32 [b, 3, height, width], on the same device."""
        mean = torch.tensor(self.mean, device=pixels.device)
        std = torch.tensor(self.std, device=pixels.device)
        x = pixels.to(torch.float32).div(255).sub(mean).div(std)
        return x.permute(0, 3, 1, 2)

    def denormalise(self, x: torch.Tensor) -> torch.Tensor:
        """[b, 3, height, width] as the model takes it -> the same in [0, 1]."""
        return scaled_back(x, self.mean, self.std)


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
        raise InputError(_reason(error), "the file is damaged or not a picture") from error


def scaled_back(x: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Undo the normalisation of channels. [b, c, ...] -> the same"""
    shape = (-1, *[1] * (x.dim() - 2))
    centre, scale = (torch.tensor(v, device=x.device).view(shape) for v in (mean, std))
    return x * scale + centre


@contextlib.contextmanager
def trusted_sizes() -> Iterator[None]:
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


def _scaled(width: int, height: int, short: int) -> tuple[int, int]:
    """torchvision's rule: the long side is truncated, not rounded."""
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


_REASONS: dict[str, Callable[[Exception], str]] = {
    "UnidentifiedImageError": lambda e: "not a picture in a format that is read here",
    "MemoryError": lambda e: "too large for this machine's memory",
}


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if name in _REASONS:
        return _REASONS[name](error)
    return next(iter(str(error).splitlines()), "") or name
