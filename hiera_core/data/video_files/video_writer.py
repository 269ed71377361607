"""Encode frames as a video file."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np


def encode(frames: np.ndarray, rate: int | Fraction) -> bytes:
    """Return an MP4 file (H.264) with the given frames.

    Args:
        frames: uint8 [frames, height, width, 3]. Height and width must be even.
        rate: Frames per second.
    """
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
