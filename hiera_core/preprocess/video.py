"""Videos to model input, as SlowFast evaluates them: clips along time, crops along the long side.

Sources: SlowFast's decoder.get_start_end_idx with offset sampling, temporal_sampling, and
spatial_sampling; the paper's K400 numbers are taken with 5 clips x 3 crops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import zoo
from ..errors import CheckpointError, InputError, UsageError
from .frames import Video
from .image import MAX_PIXELS, ImageTransform, scaled_back

MAX_DAMAGED = 0.1  # share of frames that may be damaged or lost before a video is an error
FRAMES_A_CHUNK = 16  # of `--every`


@dataclass(frozen=True)
class Sampling:
    """Which parts of a video are seen.

    Args:
        clips, crops: views along time and along the long side; None: 5 x 3 for a whole video, 1 x 1
            for a piece of one.
        stride: frames from one sampled frame to the next, at 30 a second.
        segments: seconds; label the video in pieces of this length.
        every: seconds; show single frames, this far apart, to an image model.
        max_pixels: larger frames are refused before decoding.

    Raises:
        UsageError: a number that makes no sense.
    """

    clips: int | None = None
    crops: int | None = None
    stride: int | None = None
    segments: float | None = None
    every: float | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for name in ("clips", "crops", "stride", "segments", "every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} is {value}", "give a number above 0")
        if self.segments is not None and self.every is not None:
            raise UsageError(
                "segments are for video models, every is for image models", "choose one"
            )

    @property
    def views(self) -> tuple[int, int]:
        """Clips and crops."""
        whole = self.segments is None
        return self.clips or (5 if whole else 1), self.crops or (3 if whole else 1)


@dataclass
class Report:
    """What was read of a video, for its record."""

    duration: float  # seconds
    fps: float
    frames: int  # in the video
    used: int = 0  # of them, each counted once a piece
    damaged: int = 0  # of those used: decoded with errors, or lost and replaced by a neighbour
    views: int = 0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        names = ("duration", "fps", "frames", "used", "damaged", "views")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Piece:
    """What the model sees of a stretch of video.

    `views` yields arrays as the model's transform wants them: float32 [frames, height, width, 3]
    for clips, uint8 [height, width, 3] for single frames.
    """

    start: float  # seconds
    end: float
    views: Sequence[np.ndarray]
    frames: Sequence[np.ndarray] | np.ndarray  # those the views are cut from
    times: Sequence[float]  # of those frames, in seconds


class Views(Sequence[np.ndarray]):
    """Clips x crops over frames that they share: view i is clip i // crops, crop i % crops."""

    def __init__(
        self, frames: np.ndarray, clips: np.ndarray, boxes: list[tuple[int, int]], size: Any
    ) -> None:
        self.frames, self.clips, self.boxes, self.size = frames, clips, boxes, size

    def __len__(self) -> int:
        return len(self.clips) * len(self.boxes)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        clip, (top, left) = (
            self.clips[index // len(self.boxes)],
            self.boxes[index % len(self.boxes)],
        )
        height, width = self.size
        return self.frames[clip, top : top + height, left : left + width]


@dataclass(frozen=True)
class VideoTransform:
    """Evaluation preprocessing of a video model.

    Args:
        size: height and width the model takes, in pixels.
        frames: of a clip.
        stride: from one of them to the next, at `fps` frames a second.
        fps: that rate.
        mean, std: of channels scaled to [0, 1].
    """

    size: tuple[int, int]
    frames: int
    stride: int
    fps: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_card(
        cls, preprocessing: Mapping[str, Any] | None, input_size: tuple[int, ...]
    ) -> VideoTransform:
        """A model's own preprocessing, at its input size.

        Raises:
            CheckpointError: hiera.json holds something else.
        """
        known = {**zoo.get(zoo.DEFAULT_VIDEO_MODEL).preprocessing, **(preprocessing or {})}
        frames, height, width = input_size
        try:
            mean, std = tuple(map(float, known["mean"])), tuple(map(float, known["std"]))
            stride, fps = int(known["stride"]), float(known["fps"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"preprocessing in hiera.json is not usable ({error})") from error
        return cls((height, width), frames, stride, fps, mean, std)

    def pieces(self, source: Path | bytes, sampling: Sampling) -> tuple[Report, Iterator[Piece]]:
        """Open a video and say what will be read; then read it, a piece at a time.

        Raises:
            InputError: see `Video`. From the iterator: too many frames are damaged.
        """
        video = Video(source, sampling.max_pixels)
        clips, crops = sampling.views
        report = _report_of(video)
        transform = self if sampling.stride is None else replace(self, stride=sampling.stride)
        return report, transform._read(video, sampling.segments, clips, crops, report)

    def _read(
        self, video: Video, segments: float | None, clips: int, crops: int, report: Report
    ) -> Iterator[Piece]:
        with video:
            for first, last in _spans(video, segments):
                indices = first + clip_indices(
                    last - first, video.fps, clips, self.frames, self.stride, self.fps
                )
                if last - first < self.frames * self.stride / self.fps * video.fps:
                    note = f"shorter than a clip ({last - first} frames): the last one is repeated"
                    if note not in report.notes:
                        report.notes += (note,)
                if (indices == indices[0]).all():
                    indices = indices[:1]  # the same clip again would not change the average
                wanted, rows = np.unique(indices, return_inverse=True)
                frames, boxes = self._frames(video, wanted.tolist(), crops, report)
                views = Views(frames, rows.reshape(indices.shape), boxes, self.size)
                report.views += len(views)
                times = wanted / video.fps
                yield Piece(first / video.fps, last / video.fps, views, frames, times.tolist())

    def _frames(
        self, video: Video, wanted: list[int], crops: int, report: Report
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """What the crops need of these frames, resized. -> float32 [n, height, columns, 3]"""
        frames, boxes, damaged = None, [(0, 0)], 0
        for row, shown in enumerate(video.read(wanted)):
            height, width = shown.pixels.shape[:2]
            if frames is None:
                grid = _Grid.of(height, width, self.size, crops)
                boxes = grid.boxes
                frames = np.empty((len(wanted), len(grid.y), len(grid.x), 3), np.float32)
            frames[row] = grid.sample(shown.pixels)
            damaged += not shown.sound
        report.used += len(wanted)
        report.damaged += damaged
        tolerate(damaged, len(wanted))
        assert frames is not None
        return frames, boxes

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [b, t, height, width, 3], 0..255 -> [b, 3, t, height, width], same device."""
        mean = torch.tensor(self.mean, device=pixels.device)
        std = torch.tensor(self.std, device=pixels.device)
        return pixels.div(255).sub(mean).div(std).permute(0, 4, 1, 2, 3)

    def denormalise(self, x: torch.Tensor) -> torch.Tensor:
        """[b, 3, t, height, width] as the model takes it -> the same in [0, 1]."""
        return scaled_back(x, self.mean, self.std)


def frames_every(
    source: Path | bytes, sampling: Sampling, transform: ImageTransform
) -> tuple[Report, Iterator[Piece]]:
    """Single frames of a video, for an image model; pieces of one view each.

    Raises:
        InputError: as `VideoTransform.pieces`.
    """
    assert sampling.every is not None
    video = Video(source, sampling.max_pixels)
    report = _report_of(video)
    return report, _read_every(video, sampling.every, transform, report)


def _report_of(video: Video) -> Report:
    cut = "its format declares no length: if it was cut off, that does not show"
    notes = () if video.declares_length else (cut,)
    return Report(video.duration, video.fps, video.frames, notes=notes)


def _read_every(
    video: Video, seconds: float, transform: ImageTransform, report: Report
) -> Iterator[Piece]:
    with video:
        wanted = [first for first, _ in _spans(video, seconds)]
        for row, shown in enumerate(video.read(wanted)):
            report.used += 1
            report.views += 1
            report.damaged += not shown.sound
            tolerate(report.damaged, len(wanted))
            end = wanted[row + 1] if row + 1 < len(wanted) else video.frames
            view, time = transform.crop(Image.fromarray(shown.pixels)), shown.index / video.fps
            yield Piece(time, end / video.fps, [view], [view], [time])


def clip_indices(
    frames: int,
    fps: float,
    clips: int,
    length: int = 16,
    stride: int = 4,
    target_fps: float = 30,
) -> np.ndarray:
    """Frame numbers of evenly spread clips, as SlowFast's test sampling has them.

    Args:
        frames, fps: of the video.
        clips: how many; a single one is taken from the middle.
        length, stride, target_fps: `length` frames, `stride` apart at `target_fps`.

    Returns:
        int64 [clips, length]; beyond the last frame it is repeated.
    """
    span = stride * length / target_fps * fps
    delta = max(frames - span, 0)
    step = math.floor(delta / 2) if clips == 1 else math.floor(delta / (clips - 1))
    starts = [step] if clips == 1 else [clip * step for clip in range(clips)]
    return frame_indices(starts, span, length, frames)


def frame_indices(starts: Sequence[float], span: float, length: int, frames: int) -> np.ndarray:
    """Frame numbers of clips that begin at `starts` and reach over `span` of a video's frames.
    -> int64 [clips, length]; beyond the last frame it is repeated."""
    rows = [torch.linspace(start, start + span - 1, length) for start in starts]
    return torch.stack(rows).clamp(0, frames - 1).long().numpy()


def crop_offsets(side: int, size: int, crops: int) -> list[int]:
    """Where crops of `size` begin along a side: the first at 0, the last at the end, the centre
    rounded up; a single one is the centre."""
    room = side - size
    if crops == 1:
        return [math.ceil(room / 2)]
    return [math.ceil(room * i / (crops - 1)) for i in range(crops)]


def scaled_size(height: int, width: int, short: int) -> tuple[int, int]:
    """Short side to `short`; the long side is rounded down."""
    if height <= width:
        return short, math.floor(width / height * short)
    return math.floor(height / width * short), short


@dataclass(frozen=True)
class _Grid:
    """Rows and columns of the resized frame that the crops need, and where each crop begins."""

    y: np.ndarray  # in source pixels
    x: np.ndarray
    boxes: list[tuple[int, int]]  # top, left in the sampled frame

    @classmethod
    def of(cls, height: int, width: int, size: tuple[int, int], crops: int) -> _Grid:
        new_h, new_w = scaled_size(height, width, max(size))
        along_x = new_w >= new_h
        tops = crop_offsets(new_h, size[0], 1 if along_x else crops)
        lefts = crop_offsets(new_w, size[1], crops if along_x else 1)
        corners = [(top, left) for top in tops for left in lefts]
        corners = corners[:1] if len(set(corners)) == 1 else corners
        rows = np.unique([top + np.arange(size[0]) for top in tops])
        columns = np.unique([left + np.arange(size[1]) for left in lefts])
        boxes = [
            (int(np.searchsorted(rows, t)), int(np.searchsorted(columns, x))) for t, x in corners
        ]
        return cls(_centres(rows, height / new_h), _centres(columns, width / new_w), boxes)

    def sample(self, pixels: np.ndarray) -> np.ndarray:
        """Bilinear without antialias, as torch's interpolate(align_corners=False)."""
        return _lerp(_lerp(pixels, self.y, 0), self.x, 1)


def _centres(places: np.ndarray, scale: float) -> np.ndarray:
    return np.maximum((places + 0.5) * scale - 0.5, 0).astype(np.float32)


def _lerp(pixels: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    """Between neighbours along an axis. -> float32"""
    low = np.minimum(places.astype(np.int64), pixels.shape[axis] - 1)
    high = np.minimum(low + 1, pixels.shape[axis] - 1)
    weight = (places - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    a, b = pixels.take(low, axis).astype(np.float32), pixels.take(high, axis).astype(np.float32)
    return a + (b - a) * weight


def _spans(video: Video, seconds: float | None) -> Iterator[tuple[int, int]]:
    """First and last + 1 frame of each piece; the whole video when `seconds` is None."""
    if seconds is None:
        yield 0, video.frames
        return
    first, number = 0, 0
    while first < video.frames:
        number += 1
        last = min(video.frames, max(first + 1, round(number * seconds * video.fps)))
        yield first, last
        first = last


def tolerate(damaged: int, wanted: int) -> None:
    """Raise InputError when more than a tenth of the frames are damaged."""
    if damaged > MAX_DAMAGED * wanted:
        raise InputError(
            f"{damaged} of {wanted} frames are damaged or lost",
            "the file is damaged or cut off; fetch it again",
        )
