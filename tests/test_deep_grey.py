"""Tests of grey images of more than 8 bits: which values become black and white."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from hiera_core.data.image_reader import open_image

GRADIENT = np.tile(np.linspace(0, 1, 64), (48, 1))  # dark left, bright right


def tiff(values: np.ndarray, bits: int | None = None, **tags: int) -> bytes:
    """Return an uncompressed grey TIFF with values of any integer or float type."""
    order = {"<": b"II", ">": b"MM"}[values.dtype.str[0].replace("|", "<")]
    end = "<" if order == b"II" else ">"
    height, width = values.shape
    fields = {
        256: width, 257: height, 258: bits or values.dtype.itemsize * 8, 259: 1, 262: 1, 273: 0,
        277: 1, 278: height, 279: values.nbytes, 339: {"u": 1, "i": 2, "f": 3}[values.dtype.kind],
    }  # fmt: skip
    fields |= {int(name.strip("_")): value for name, value in tags.items()}
    fields[273] = 8 + 2 + 12 * len(fields) + 4
    entries = b"".join(struct.pack(end + "HHII", t, 4, 1, v) for t, v in sorted(fields.items()))
    head = order + struct.pack(end + "HIH", 42, 8, len(fields))
    return head + entries + bytes(4) + values.tobytes()


def greys(data: bytes) -> tuple[np.ndarray, list[str]]:
    image, notes = open_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)[..., 0] / 255, notes


@pytest.mark.parametrize("type", ["<u2", ">u2", "<i2", ">i2", "<u4", "<i4", ">i4"])
@pytest.mark.parametrize("largest", ["8 bits", "16 bits", "type"])
def test_integers_are_scaled_by_the_bits_that_they_need(type: str, largest: str) -> None:
    whole = np.iinfo(type).max
    high = min(whole, {"8 bits": 255, "16 bits": 65535}.get(largest, whole))
    grey, notes = greys(tiff((GRADIENT * high).astype(type)))
    assert np.abs(grey - GRADIENT).max() < 0.01
    bits = {255: "8-bit values", 32767: "16-bit grey", 65535: "16-bit grey"}
    assert len(notes) == 1 and notes[0].startswith(bits.get(high, "32-bit grey"))


@pytest.mark.parametrize("tag", ["_281", "_341"])
@pytest.mark.parametrize("type", ["<u2", ">u2", "<i2", "<u4", "<i4"])
def test_the_largest_sample_value_is_white(type: str, tag: str) -> None:
    grey, notes = greys(tiff((GRADIENT * 4095).astype(type), **{tag: 4095}))
    assert np.abs(grey - GRADIENT).max() < 0.01
    assert notes == ["12-bit grey scaled to 8 bits"]
    # A value that some samples exceed is an error in the file.
    grey, _ = greys(tiff((GRADIENT * 32767).astype(type), **{tag: 4095}))
    assert grey.max() > 0.49 and len(np.unique(grey)) == 64


def test_packed_12_bit_values_keep_their_greys() -> None:
    values = (GRADIENT * 4095).astype(np.uint16)
    first, second = values[:, ::2].astype(np.uint32), values[:, 1::2].astype(np.uint32)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
    data = tiff(values, bits=12)[: -values.nbytes] + packed.astype(np.uint8).tobytes()
    grey, notes = greys(data)
    assert np.abs(grey - GRADIENT).max() < 0.01
    assert notes == ["12-bit grey scaled to 8 bits"]


@pytest.mark.parametrize("type", ["<i2", ">i2", "<i4"])
def test_negative_values_are_scaled_from_their_minimum(type: str) -> None:
    """Such as the Hounsfield units of a CT scan."""
    grey, notes = greys(tiff((GRADIENT * 4000 - 1000).astype(type)))
    assert np.abs(grey - GRADIENT).max() < 0.01
    assert notes == ["signed grey from -1000 to 3000 scaled to 8 bits"]


@pytest.mark.parametrize("type", ["<f4", ">f4"])
def test_floats_are_scaled_unless_they_are_within_0_and_1(type: str) -> None:
    assert np.abs(greys(tiff(GRADIENT.astype(type)))[0] - GRADIENT).max() < 0.01
    grey, notes = greys(tiff((GRADIENT * 300 - 100).astype(type)))
    assert np.abs(grey - GRADIENT).max() < 0.01
    assert notes == ["float grey from -100 to 200 scaled to 8 bits"]


@pytest.mark.parametrize("format", ["PNG", "PPM"])
def test_other_formats_define_white(format: str) -> None:
    """A dark picture of 16 bits stays dark, because only TIFF leaves open which value is white."""
    file = io.BytesIO()
    Image.fromarray((GRADIENT * 255).astype(np.uint16)).save(file, format)
    grey, notes = greys(file.getvalue())
    assert grey.max() < 0.01 and notes == ["16-bit grey scaled to 8 bits"]
