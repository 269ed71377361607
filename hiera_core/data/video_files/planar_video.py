"""A video whose frames stay as its decoder makes them, where a device turns them into RGB."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from ..image_reader import MAX_PIXELS
from .decoder_threads import DecoderThreads
from .frame_colours import frame_to_rgb
from .video_reader import DecodedFrame, Video
from .yuv_layout import WEIGHTS, Conversion, YuvLayout

FORMATS = ("yuv420p", "yuvj420p")  # 8 bits, with a colour for each square of four pixels
TRIAL_ROWS, TRIAL_PIXELS = 64, 1 << 14  # of the noise with which a conversion is found, at least
MAX_WIDTH = 8192  # of frames that are kept as planes; it also bounds the noise


class PlanarVideo(Video):
    """A `Video` whose frames are planes, see `DecodedFrame.layout`, up to the first frame that has
    another layout, or cannot be kept in one. That frame and those after it are RGB.

    Args:
        source, max_pixels, threads: See `Video`.
        keeps: Whether frames of this layout are to be kept as planes. Otherwise all frames are RGB.
    """

    def __init__(
        self,
        source: Path | bytes,
        max_pixels: int = MAX_PIXELS,
        threads: DecoderThreads | None = None,
        *,
        keeps: Callable[[YuvLayout], bool] = lambda layout: True,
    ) -> None:
        super().__init__(source, max_pixels, threads)
        self._keeps, self._is_planar = keeps, True
        self._layout: YuvLayout | None = None  # of the frames so far

    def _output(self, index: int, frame: Any, intact: bool) -> DecodedFrame:
        if self._is_planar:
            layout = self._layout_of(frame)
            if layout is not None:
                return DecodedFrame(index, layout.pack(frame), intact, layout)
            self._is_planar = False
        return super()._output(index, frame, intact)

    def _layout_of(self, frame: Any) -> YuvLayout | None:
        """Return the layout of a frame, or None if it is to be RGB."""
        layout = layout_of(frame)
        # A frame of another size would be resized to the declared one.
        if layout is None or (layout.width, layout.height) != (self.width, self.height):
            return None
        if self._layout is None and self._keeps(layout):
            self._layout = layout
        return layout if layout == self._layout else None


def layout_of(frame: Any) -> YuvLayout | None:
    """Return how the planes of a decoded frame of PyAV are kept, or None if `YuvLayout.to_rgb`
    would not return the pixels that PyAV does: for other pixel formats, for instance, or for
    interlaced frames, each half of which has colours of its own."""
    if frame.format.name not in FORMATS or frame.interlaced_frame:
        return None
    if any(plane.line_size < plane.width for plane in frame.planes):
        return None
    if frame.width > MAX_WIDTH:
        return None
    colours = int(frame.colorspace), int(frame.color_range)
    conversion = _find_conversion(frame.format.name, *colours, frame.width, frame.height % 2)
    if conversion is None:
        return None
    return YuvLayout(frame.height, frame.width, round(frame.rotation / 90), conversion)


@functools.lru_cache(maxsize=256)
def _find_conversion(
    pixels: str, colorspace: int, color_range: int, width: int, is_odd: int
) -> Conversion | None:
    """Return the conversion that PyAV uses for such frames, or None if it uses another than these.

    Args:
        pixels, colorspace, color_range: Of a frame of PyAV.
        width: Of the frame. Its end may be converted by other instructions than the rest.
        is_odd: Whether its height is odd. Then the colours of rows are mixed.
    """
    height = max(TRIAL_ROWS, TRIAL_PIXELS // width // 2 * 2) + is_odd
    try:
        frame = _noise(pixels, width, height)
        frame.colorspace, frame.color_range = colorspace, color_range
        expected = torch.from_numpy(frame_to_rgb(VideoReformatter(), frame, width, height))
    except (av.FFmpegError, AttributeError, TypeError, ValueError):
        return None  # it raises the same for a frame of the video, or takes no such frame
    for weights in WEIGHTS.values():
        for is_full in (False, True):
            layout = YuvLayout(height, width, 0, Conversion.of(*weights, is_full))
            packed = torch.from_numpy(layout.pack(frame))
            if torch.equal(layout.to_rgb(packed[None])[0], expected):
                return layout.conversion
    return None


def _noise(pixels: str, width: int, height: int) -> Any:
    """Return a frame of PyAV with random levels."""
    generator = np.random.default_rng(0)
    frame = av.VideoFrame(width, height, pixels)
    for plane in frame.planes:
        plane.update(generator.bytes(plane.buffer_size))
    return frame
