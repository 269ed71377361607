"""Whether decoded pixels are what a model takes: they may come from a file of another run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ...data.clip_reader import ClipViews, DecodedSegment
from ...data.transforms import scaled_size
from ...data.video_files.frame_store import MAX_RESIZED
from ...errors import InputError
from ...records import Kind
from ..decoded_input import DecodedInput

DECODE_HINT = "decode with Decoder for the same model"


def check_fits(decoded: DecodedInput, runner_of: Callable[[Kind], Any]) -> None:
    """Check the shapes of a decoded input. Its first segment is read for that.

    Args:
        decoded: The input.
        runner_of: Returns the `BatchRunner` for a kind of input.

    Raises:
        InputError: It has other shapes than the model takes, or is of another kind.
    """
    if decoded.pixels is not None:
        if decoded.record.kind != "image":
            raise InputError("an image in the record of a video", DECODE_HINT)
        assert isinstance(decoded.pixels, np.ndarray)  # what was read from bytes is on the host
        expected = (*runner_of("image").transform.size, 3)
        _check_array(decoded.pixels, expected, np.uint8)
    elif decoded.segments is not None:
        runner = runner_of(decoded.record.kind)
        try:
            first = next(decoded.segments)
        except InputError as error:  # the pipeline reports it, with what is known about the video
            decoded.segments = _raise(error)
            return
        decoded.segments = itertools.chain([first], decoded.segments)
        _check_segment(first, runner.transform)


def _raise(error: InputError) -> Iterator[DecodedSegment]:
    raise error
    yield


def _check_segment(segment: DecodedSegment, transform: Any) -> None:
    views = segment.views
    assert isinstance(views, ClipViews)
    if views.size != tuple(transform.size):
        raise InputError(
            f"views of {_text(views.size)} pixels, and the model takes {_text(transform.size)}",
            DECODE_HINT,
        )
    if views.clips.shape[1] != transform.frames:
        raise InputError(
            f"clips of {views.clips.shape[1]} frames, and the model takes {transform.frames}",
            DECODE_HINT,
        )
    if not views.boxes or not len(views.clips):
        raise InputError("a segment without views", DECODE_HINT)
    rows, columns = views.frames.shape[1:3]
    height, width = views.size
    if views.scaled is not None:
        wanted = scaled_size(rows, columns, max(views.size))
        area = MAX_RESIZED * len(views.boxes) * height * width
        if views.scaled != wanted or math.prod(wanted) > area:  # they would fill the memory
            raise InputError(f"frames that become {_text(views.scaled)} pixels", DECODE_HINT)
        rows, columns = wanted
    for top, left in views.boxes:
        if not (0 <= top <= rows - height and 0 <= left <= columns - width):
            raise InputError("a crop lies outside of its frame", DECODE_HINT)


def _check_array(pixels: np.ndarray, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    if pixels.shape != shape or pixels.dtype != dtype:
        raise InputError(
            f"{pixels.dtype} pixels of {_text(pixels.shape)}, and the model takes {_text(shape)}",
            DECODE_HINT,
        )


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
