"""Tests of decoded inputs as bytes: what was written is read, and damage is an error of its row."""

from __future__ import annotations

import contextlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hiera_core
from hiera_core.data.sources import Source
from hiera_core.errors import InputError
from hiera_core.inference.columns.decoded_bytes import from_bytes, source_to_bytes, to_bytes
from hiera_core.inference.decoded_input import DecodedInput
from hiera_core.inference.predict import Predictor
from hiera_core.records import Record

SAMPLES = Path(hiera_core.__file__).parent / "zoo/assets/samples"


def decoded_image() -> DecodedInput:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    record = Record("a\udcff.png", 7, "m", notes=["first frame"], id="k")
    return DecodedInput(record, pixels)


def test_an_image_comes_back() -> None:
    given = decoded_image()
    found = from_bytes(to_bytes(given))
    assert isinstance(found, DecodedInput) and found.pixels is not None
    assert found.record == given.record
    assert (found.pixels == given.pixels).all() and found.pixels.flags.writeable


def test_a_failure_comes_back() -> None:
    record = Record("a.png", 7, "m").fail(InputError("is damaged", "get it again"))
    found = from_bytes(to_bytes(DecodedInput(record)))
    assert isinstance(found, DecodedInput) and found.pixels is None and found.segments is None
    assert found.record.to_json() == record.to_json()


def test_clips_of_a_video_come_back() -> None:
    predictor = Predictor("hiera_nano_8x32", dtype="fp32", workers=1)
    source = Source("clip", path=SAMPLES / "moving_right.mp4")
    content = to_bytes(predictor.decode(source, 0))
    (expected,) = predictor([source])
    found = from_bytes(content)
    assert isinstance(found, DecodedInput)
    assert predictor.compute([found])[0].to_json() == expected.to_json()


def test_a_source_comes_back() -> None:
    source = Source("a.tar/b.mp4", path=Path("a.tar"), span=(512, 9), id=3, in_list=True)
    url = Source("http://h/b.mp4", url="http://h/b.mp4", public_only=True)
    for given in (source, url):
        assert from_bytes(source_to_bytes(given, 5)) == replace(given, position=5)


def test_damaged_bytes_are_an_error_and_run_no_code() -> None:
    content = to_bytes(decoded_image())

    for damaged in (b"", b"abc", content[:40], content[:-1], pickle.dumps(decoded_image())):
        with pytest.raises(InputError, match="not the bytes of a decoded input"):
            from_bytes(damaged)
    for position in range(0, len(content), 7):  # any byte changed: an error, or other values
        changed = bytearray(content)
        changed[position] ^= 0x55
        with contextlib.suppress(InputError):
            from_bytes(bytes(changed))
