"""Convert images of more than 8 bits to 8. Pillow alone would clip grey ones to white."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..errors import InputError

# Tags of TIFF files.
BITS_PER_SAMPLE, SAMPLE_FORMAT = 258, 339
MAX_SAMPLE_VALUES = (341, 281)  # SMaxSampleValue, MaxSampleValue
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag and one of its values
SIGNED = 2  # value of SAMPLE_FORMAT
SCALED = "hiera_scaled"  # key of the note about an image whose samples have been scaled


class GreyRange(NamedTuple):
    """The values that become black and white, and what they are, for the image's record."""

    black: float
    white: float
    name: str


BYTE = GreyRange(0, 255, "8-bit values in a wider type")
WORD = GreyRange(0, 65535, "16-bit grey")


def is_deep_grey(image: Image.Image) -> bool:
    """Return whether the image is grey with more than 8 bits."""
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def deep_grey_to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Convert such an image to RGB, and add to `notes` how its values were scaled.

    Raises:
        InputError: The values are floats, and some of them are NaN or infinite.
    """
    values = np.asarray(image)
    if image.mode == "F":
        found = _float_range(values)
    else:
        values = _as_unsigned(image, values)
        found = _integer_range(image, int(values.min()), int(values.max()))
    notes.append(f"{found.name} scaled to 8 bits")
    grey = _scale(values, found)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey  # which Pillow does for 8 bits only
    return Image.fromarray(grey).convert("RGB")


def samples_to_8_bits(image: Any, samples: np.ndarray, alpha: bool) -> tuple[np.ndarray, str]:
    """Return the samples of a TIFF file as uint8, and a note for its record.

    Args:
        image: The image, whose tags say how many bits the values have.
        samples: The samples, [height, width, channels], of any type.
        alpha: Whether the last channel is alpha. It is scaled by the range of its type.

    Raises:
        InputError: The values are floats, and some of them are NaN or infinite.
    """
    colours = samples[..., :-1] if alpha else samples
    is_float = samples.dtype.kind == "f"
    if is_float:
        _float_range(samples[..., -1:])  # which checks alpha, too
        found = _float_range(colours)
    else:
        found = _integer_range(image, int(colours.min()), int(colours.max()))
    pixels = _scale(colours, found)
    if alpha:
        opaque = GreyRange(0, 1 if is_float else np.iinfo(samples.dtype).max, "")
        pixels = np.concatenate([pixels, _scale(samples[..., -1:], opaque)], axis=-1)
    what = found.name if samples.shape[-1] - alpha == 1 else found.name.replace("grey", "colour")
    return pixels, f"{what} scaled to 8 bits"


def _scale(values: np.ndarray, found: GreyRange) -> np.ndarray:
    """Return values as uint8, black as 0 and white as 255."""
    pixels = np.empty(values.shape, np.uint8)
    for y, row in enumerate(values):  # one row at a time, because float64 takes a lot of memory
        scaled = (row.astype(np.float64) - found.black) / max(found.white - found.black, 1e-12)
        pixels[y] = scaled.clip(0, 1) * 255 + 0.5
    return pixels


def _float_range(values: np.ndarray) -> GreyRange:
    """Return [0, 1] if all values are within it, else their minimum and maximum."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise InputError("float image holds NaN or infinity", "replace these values")
    if low >= 0 and high <= 1:
        return GreyRange(0, 1, "float grey")
    return GreyRange(low, high, f"float grey from {low:g} to {high:g}")


def _as_unsigned(image: Image.Image, values: np.ndarray) -> np.ndarray:
    """Return the values of an unsigned 32-bit TIFF file, which Pillow opens as signed ones."""
    tags = getattr(image, "tag_v2", {})
    wide = values.dtype == np.int32 and _first(tags.get(BITS_PER_SAMPLE)) == 32
    return values.view(np.uint32) if wide and _first(tags.get(SAMPLE_FORMAT)) != SIGNED else values


def _integer_range(image: Image.Image, low: int, high: int) -> GreyRange:
    """Return the range of integers between `low` and `high`.

    It is the range of the type, as other formats than TIFF define it. TIFF files may hold fewer
    bits than their type has. Then the file declares them, or all values fit into 8 bits, or into 16
    of 32.
    """
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return WORD if high <= WORD.white else GreyRange(0, 2**31 - 1, "32-bit grey")
    if low < 0:
        return GreyRange(low, high, f"signed grey from {low} to {high}")
    bits = _first(tags.get(BITS_PER_SAMPLE)) or 16
    signed = _first(tags.get(SAMPLE_FORMAT)) == SIGNED
    whole = GreyRange(0, 2 ** (bits - signed) - 1, f"{bits}-bit grey")
    for candidate in (_declared_range(tags), BYTE, WORD):
        if candidate is not None and high <= candidate.white < whole.white:
            return candidate
    return whole


def _declared_range(tags: Any) -> GreyRange | None:
    """Return the range of the number of bits that the largest declared value needs."""
    for tag in MAX_SAMPLE_VALUES:
        value = _first(tags.get(tag))
        if isinstance(value, int | float) and 1 <= value < 2**32:
            bits = int(value).bit_length()
            return GreyRange(0, 2**bits - 1, f"{bits}-bit grey")
    return None


def _first(value: Any) -> Any:
    """Return the first item of a tag with several values."""
    return value[0] if isinstance(value, tuple) and value else value
