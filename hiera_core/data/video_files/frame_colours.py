"""Decoded frames of PyAV in RGB, by swscale, FFmpeg's library for colours."""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

# From version 17 on, PyAV converts colours in one thread per core by default.
ONE_THREAD = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}


def frame_to_rgb(reformatter: VideoReformatter, frame: Any, width: int, height: int) -> np.ndarray:
    """Return a frame as uint8 [height, width, 3], resized to this size and not rotated.

    Args:
        reformatter: It is shared by the frames of a video, because its setup is slow.
        frame: A decoded frame.
        width, height: Size of the result.
    """
    rgb = reformatter.reformat(frame, width, height, "rgb24", **ONE_THREAD)
    pixels: np.ndarray = rgb.to_ndarray()
    return pixels
