"""Decode what a model sees of a video: clips and crops, or single frames, one segment at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image

from .clip_sampling import Sampling, VideoReport, clip_indices, segment_bounds
from .memory import FrameArray
from .transforms import CropGrid, ImageTransform, VideoTransform
from .video_files.animation_reader import Animation, open_video
from .video_files.decoder_threads import DecoderThreads
from .video_files.video_reader import Video, check_damage

AnyVideo = Video | Animation | FrameArray


@dataclass(frozen=True)
class DecodedSegment:
    """What the model sees of a segment of a video.

    `views` yields arrays in the form that the model's transform normalises: float32
    [frames, height, width, 3] for clips, uint8 [height, width, 3] for single frames.
    """

    start: float  # seconds
    end: float
    views: Sequence[np.ndarray]
    frames: Sequence[np.ndarray] | np.ndarray  # the frames that the views are cut from
    times: Sequence[float]  # of those frames, in seconds


class ClipViews(Sequence[np.ndarray]):
    """Clips x crops that share their frames: view i is clip i // crops, crop i % crops.

    Args:
        frames: float32 [n, rows, columns, 3].
        clips: Indices into `frames`, int64 [clips, length].
        boxes: (top, left) of each crop.
        size: (height, width) of a crop.
    """

    def __init__(
        self,
        frames: np.ndarray,
        clips: np.ndarray,
        boxes: list[tuple[int, int]],
        size: tuple[int, int],
    ) -> None:
        self.frames, self.clips, self.boxes, self.size = frames, clips, boxes, size

    def __len__(self) -> int:
        return len(self.clips) * len(self.boxes)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        clip, crop = divmod(index, len(self.boxes))
        (top, left), (height, width) = self.boxes[crop], self.size
        view: np.ndarray = self.frames[self.clips[clip], top : top + height, left : left + width]
        return view


def read_segments(
    source: Path | bytes | np.ndarray,
    sampling: Sampling,
    transform: ImageTransform | VideoTransform,
    threads: DecoderThreads | None = None,
) -> tuple[VideoReport, Iterator[DecodedSegment]]:
    """Open a video. Return a report, which is filled in as segments are read, and the segments.

    A video model gets clips, an image model single frames, `sampling.every` seconds apart. A clip
    in memory that has as many frames as the model takes is the model's clip. For `threads`, see
    `Video`.

    Raises:
        InputError: See `Video`. The iterator raises it if too many frames are damaged.
    """
    video: AnyVideo
    if isinstance(source, np.ndarray):
        video = FrameArray(source)
        if isinstance(transform, VideoTransform) and video.frames == transform.frames:
            transform = replace(transform, stride=1, fps=video.fps)
    else:
        video = open_video(source, sampling.max_pixels, threads)
    notes = video.notes
    if not video.declares_length:
        notes += ("its format declares no length, so truncation cannot be detected",)
    report = VideoReport(video.duration, video.fps, video.frames, notes=notes)
    if isinstance(transform, ImageTransform):
        assert sampling.every is not None
        return report, _single_frames(video, sampling.every, transform, report)
    stride, fps = sampling.stride or transform.stride, sampling.fps or transform.fps
    return report, _clips(video, sampling, replace(transform, stride=stride, fps=fps), report)


def _clips(
    video: AnyVideo, sampling: Sampling, transform: VideoTransform, report: VideoReport
) -> Iterator[DecodedSegment]:
    clips, crops = sampling.views
    clip_span = transform.frames * transform.stride / transform.fps * video.fps
    is_short = False
    with video:
        for first, last in segment_bounds(video.frames, video.fps, sampling.segments):
            indices = first + clip_indices(
                last - first, video.fps, clips, transform.frames, transform.stride, transform.fps
            )
            if last - first < clip_span and not is_short:
                is_short = True  # one note is enough for all segments
                note = f"shorter than a clip ({last - first} frames): the last frame is repeated"
                report.notes += (note,)
            if (indices == indices[0]).all():
                indices = indices[:1]  # the same clip again would not change the average
            wanted, rows = np.unique(indices, return_inverse=True)
            frames, boxes = _crop_frames(video, wanted.tolist(), crops, transform.size, report)
            views = ClipViews(frames, rows.reshape(indices.shape), boxes, transform.size)
            report.views += len(views)
            times = (wanted / video.fps).tolist()
            yield DecodedSegment(first / video.fps, last / video.fps, views, frames, times)


def _crop_frames(
    video: AnyVideo,
    wanted: list[int],
    crops: int,
    size: tuple[int, int],
    report: VideoReport,
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Decode frames and resize the part of them that the crops need.

    -> float32 [n, rows, columns, 3], and (top, left) of each crop
    """
    frames, boxes, damaged = None, [(0, 0)], 0
    for row, decoded in enumerate(video.read(wanted)):
        if frames is None:
            height, width = decoded.pixels.shape[:2]
            grid = CropGrid.for_crops(height, width, size, crops)
            boxes = grid.boxes
            frames = np.empty((len(wanted), len(grid.y), len(grid.x), 3), np.float32)
        frames[row] = grid.sample(decoded.pixels)
        damaged += not decoded.intact
    report.used += len(wanted)
    report.damaged += damaged
    check_damage(damaged, len(wanted))
    assert frames is not None
    return frames, boxes


def _single_frames(
    video: AnyVideo, seconds: float, transform: ImageTransform, report: VideoReport
) -> Iterator[DecodedSegment]:
    with video:
        wanted = [first for first, _ in segment_bounds(video.frames, video.fps, seconds)]
        for row, decoded in enumerate(video.read(wanted)):
            report.used += 1
            report.views += 1
            report.damaged += not decoded.intact
            check_damage(report.damaged, len(wanted))
            end = wanted[row + 1] if row + 1 < len(wanted) else video.frames
            view = transform.crop(Image.fromarray(decoded.pixels))
            time = decoded.index / video.fps
            yield DecodedSegment(time, end / video.fps, [view], [view], [time])
