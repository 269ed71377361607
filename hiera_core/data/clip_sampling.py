"""Choose the frames and crops of a video that the model sees, as in SlowFast's evaluation.

Sources: SlowFast's decoder.get_start_end_idx with offset sampling, temporal_sampling and
spatial_sampling. The paper's Kinetics-400 accuracy is measured with 5 clips x 3 crops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from ..errors import UsageError, check_choice, check_positive, is_number, is_whole
from ..records import VideoJson
from .image_reader import MAX_PIXELS

# Largest values. Beyond them, the views of a single video would fill the memory, or positions in
# it would not be finite numbers.
MOST = {
    "clips": 1000,
    "crops": 100,
    "stride": 1_000_000,
    "segments": 1e9,
    "every": 1e9,
    "fps": 1e6,
}
Decoder = Literal["pillow", "nvjpeg", "torchcodec"]
LEAST_RATE = 1e-6  # smallest number of seconds, or of frames per second


@dataclass(frozen=True)
class Sampling:
    """How inputs are read, and which parts of a video the model sees.

    Args:
        clips, crops: Views along time and along the long side. None: 5 x 3 for a whole video, 1 x 1
            for each segment.
        stride: Distance between sampled frames, in frames at `fps`. None: the model's own.
        segments: Length in seconds of the segments into which the video is split.
        every: Distance in seconds between the single frames that an image model sees.
        max_pixels: Largest number of pixels in a frame; larger frames are refused undecoded.
        fps: Frame rate at which `stride` is counted. None: the model's own.
        fast_jpeg: Decode JPEG files to a reduced size, at least twice that which the model needs.
            This is faster for large photos, and changes their pixels a little.
        decoder: What decodes. `pillow`: Pillow images, PyAV videos. `nvjpeg`: a GPU of NVIDIA
            decodes JPEG files. `torchcodec`: torchcodec decodes videos. What a decoder does not
            take, the first one decodes.

    Raises:
        UsageError: A value is not a finite number above 0, or is above its limit in `MOST`, both
            `segments` and `every` are set, or the decoder is unknown or cannot be combined with
            `fast_jpeg`.
    """

    clips: int | None = None
    crops: int | None = None
    stride: int | None = None
    segments: float | None = None
    every: float | None = None
    max_pixels: int = MAX_PIXELS
    fps: float | None = None
    fast_jpeg: bool = False
    decoder: Decoder = "pillow"

    def __post_init__(self) -> None:
        for name in ("clips", "crops", "stride", "segments", "every", "fps"):
            value = getattr(self, name)
            is_right = is_whole if name in ("clips", "crops", "stride") else is_number
            if value is not None and not is_right(value):
                kind = "whole number" if is_right is is_whole else "number"
                raise UsageError(f"{name} is {value!r:.60}", f"give a {kind} above 0")
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} is {value}", "give a number above 0")
            if value is not None and not LEAST_RATE <= value <= MOST[name]:
                hint = f"give a number from {LEAST_RATE:g} to {MOST[name]}"
                raise UsageError(f"{name} is {value}", hint)
        check_positive("max_pixels", self.max_pixels)
        check_choice("decoder", self.decoder, get_args(Decoder))
        if self.fast_jpeg and self.decoder == "nvjpeg":
            raise UsageError(
                "nvjpeg decodes JPEG files at their full size, and fast_jpeg at a reduced one",
                "choose one",
            )
        if self.segments is not None and self.every is not None:
            raise UsageError(
                "segments are for video models, every is for image models", "choose one"
            )

    @property
    def is_split(self) -> bool:
        """Whether a video has several results: one for each segment or single frame."""
        return self.segments is not None or self.every is not None

    @property
    def views(self) -> tuple[int, int]:
        """Number of clips and of crops."""
        whole = self.segments is None
        return self.clips or (5 if whole else 1), self.crops or (3 if whole else 1)


@dataclass
class VideoReport:
    """What was read from a video, for its record."""

    duration: float  # seconds
    fps: float
    frames: int  # frames in the video
    used: int = 0  # frames that were decoded for the model, counted once in each segment
    damaged: int = 0  # used frames that were decoded with errors, or lost and replaced
    views: int = 0
    notes: tuple[str, ...] = ()

    def to_json(self) -> VideoJson:
        return {
            "duration": self.duration,
            "fps": self.fps,
            "frames": self.frames,
            "used": self.used,
            "damaged": self.damaged,
            "views": self.views,
        }


def segment_bounds(frames: int, fps: float, seconds: float | None) -> Iterator[tuple[int, int]]:
    """Yield (first frame, last frame + 1) of each segment of `seconds`, or of the whole video if
    `seconds` is None."""
    if seconds is None:
        yield 0, frames
        return
    first, number = 0, 0
    while first < frames:
        number += 1
        last = min(frames, max(first + 1, round(number * seconds * fps)))
        yield first, last
        first = last


def clip_indices(
    frames: int,
    fps: float,
    clips: int,
    length: int = 16,
    stride: int = 4,
    target_fps: float = 30,
) -> np.ndarray:
    """Return the frame indices of evenly spread clips, as in SlowFast's test sampling.

    Args:
        frames, fps: Length and frame rate of the video.
        clips: Number of clips. A single clip is taken from the middle.
        length, stride, target_fps: A clip has `length` frames, `stride` apart at `target_fps`.

    Returns:
        int64 [clips, length]. Beyond the end of the video, the last frame is repeated.
    """
    span = stride * length / target_fps * fps
    delta = max(frames - span, 0)
    step = math.floor(delta / 2) if clips == 1 else math.floor(delta / (clips - 1))
    starts = [step] if clips == 1 else [clip * step for clip in range(clips)]
    return frame_indices(starts, span, length, frames)


def frame_indices(starts: Sequence[float], span: float, length: int, frames: int) -> np.ndarray:
    """Return the frame indices of clips that begin at `starts` and cover `span` frames each.

    -> int64 [clips, length]. Beyond the end of the video, the last frame is repeated.
    """
    rows = [torch.linspace(start, start + span - 1, length) for start in starts]
    indices: np.ndarray = torch.stack(rows).clamp(0, frames - 1).long().numpy()
    return indices


def crop_offsets(side: int, size: int, crops: int) -> list[int]:
    """Return where crops of `size` pixels begin along a side of `side` pixels.

    The first crop begins at 0, the last one ends at `side`, and positions between them are rounded
    up. A single crop is centred.
    """
    room = side - size
    if crops == 1:
        return [math.ceil(room / 2)]
    return [math.ceil(room * i / (crops - 1)) for i in range(crops)]
