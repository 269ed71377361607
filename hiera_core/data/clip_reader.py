"""Decode what a model sees of a video: clips and crops, or single frames, one segment at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image

from .clip_sampling import Sampling, VideoReport, clip_indices, segment_bounds
from .decoders.torchcodec_video import TorchcodecVideo
from .memory import FrameArray
from .transforms import CropGrid, ImageTransform, VideoTransform, resize_frames
from .video_files.animation_reader import Animation, VideoOpener, open_video
from .video_files.decoder_threads import DecoderThreads
from .video_files.frame_store import ON_HOST, FrameStore, KeptFrames, is_long, keeps_planes
from .video_files.planar_video import PlanarVideo
from .video_files.video_reader import Video, check_damage
from .video_files.yuv_layout import YuvLayout

AnyVideo = Video | Animation | FrameArray


@dataclass(frozen=True)
class DecodedSegment:
    """What the model sees of a segment of a video.

    `views` yields arrays in the form that the model's transform normalises: float32
    [frames, height, width, 3] for clips, uint8 [height, width, 3] for single frames. `unresized`
    returns those of clips before they are resized.
    """

    start: float  # seconds
    end: float
    views: Sequence[np.ndarray]
    frames: Sequence[np.ndarray] | np.ndarray  # the resized frames that the views are cut from
    times: Sequence[float]  # of those frames, in seconds


class ClipViews(Sequence[np.ndarray]):
    """Clips x crops that share their frames: view i is clip i // crops, crop i % crops.

    Args:
        frames: uint8 [n, height, width, 3], as decoded; float32 [n, rows, columns, 3], resized; or
            uint8 [n, bytes] with a `layout`. A tensor if they lie on a device.
        clips: Indices into `frames`, int64 [clips, length].
        boxes: (top, left) of each crop in the resized frame.
        size: (height, width) of a crop.
        scaled: (height, width) to which the frames are resized, or None if they are resized.
        layout: How planes lie in `frames`, or None for RGB.
    """

    def __init__(
        self,
        frames: np.ndarray | torch.Tensor,
        clips: np.ndarray,
        boxes: list[tuple[int, int]],
        size: tuple[int, int],
        scaled: tuple[int, int] | None = None,
        layout: YuvLayout | None = None,
    ) -> None:
        self.frames, self.clips, self.boxes, self.size = frames, clips, boxes, size
        self.scaled, self.layout = scaled, layout
        # The crops of a clip follow one another, so the last clip is resized once for all of them.
        self._last: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.clips) * len(self.boxes)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        """Return a view, float32 [length, height, width, 3] in 0..255."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        view: np.ndarray = self.tensor(index).cpu().numpy()
        return view

    def tensor(self, index: int) -> torch.Tensor:
        """Return a view where the frames lie, float32 [length, height, width, 3] in 0..255."""
        clip = index // len(self.boxes)
        if self._last is None or self._last[0] != clip:
            self._last = None  # its memory is free before the next clip is resized
            frames = torch.as_tensor(self.frames)
            rows = torch.from_numpy(self.clips[clip]).to(frames.device)
            self._last = clip, self.resize_clip(frames, rows)
        return self.crop(self._last[1], index)

    def resize_clip(self, frames: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return frames of a clip, resized. -> float32 [length, rows, columns, 3], same device

        Args:
            frames: `self.frames`, on any device.
            rows: Indices into it, on the same device.
        """
        if self.scaled is None:
            return frames[rows]
        if frames.device.type == "cpu":  # one by one, so that they stay in the cache
            resized = torch.empty(len(rows), *self.scaled, 3)
            for place, row in enumerate(rows.tolist()):
                resized[place] = resize_frames(_rgb(frames[row, None], self.layout), self.scaled)[0]
            return resized
        return resize_frames(_rgb(frames[rows], self.layout), self.scaled)

    def crop(self, resized: torch.Tensor, index: int) -> torch.Tensor:
        """Cut view `index` out of its resized clip. -> [length, height, width, 3]"""
        (top, left), (height, width) = self.boxes[index % len(self.boxes)], self.size
        return resized[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class ClipView:
    """A view of a clip that is resized only where it is needed, on the model's device."""

    parent: ClipViews
    index: int

    @property
    def clip(self) -> int:
        """The number of its clip."""
        return self.index // len(self.parent.boxes)

    def tensor(self) -> torch.Tensor:
        """Return the view where its frames lie, float32 [length, height, width, 3] in 0..255."""
        return self.parent.tensor(self.index)


def unresized(
    views: Sequence[np.ndarray | torch.Tensor],
) -> Sequence[np.ndarray | torch.Tensor | ClipView]:
    """Return views as they travel to the device: those of clips are not resized yet."""
    if isinstance(views, ClipViews):
        return [ClipView(views, index) for index in range(len(views))]
    return views


def _rgb(frames: torch.Tensor, layout: YuvLayout | None) -> torch.Tensor:
    """Return decoded frames in RGB. -> uint8 [n, height, width, 3], same device"""
    return frames if layout is None else layout.to_rgb(frames)


class ResizedFrames(Sequence[np.ndarray]):
    """Frames of a video, resized one by one when they are looked at.

    Args:
        frames: uint8 [n, height, width, 3], or [n, bytes] with a `layout`; a tensor if they lie on
            a device.
        grid: The part of the resized frame that is shown.
        layout: How planes lie in `frames`, or None for RGB.
    """

    def __init__(
        self,
        frames: np.ndarray | torch.Tensor,
        grid: CropGrid,
        layout: YuvLayout | None = None,
    ) -> None:
        self.frames, self.grid, self.layout = frames, grid, layout

    def __len__(self) -> int:
        return len(self.frames)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        grid = self.grid
        frame = _rgb(torch.as_tensor(self.frames[index][None]), self.layout)
        whole = resize_frames(frame, grid.scaled)[0].cpu().numpy()
        shown: np.ndarray = whole[grid.rows[:, None], grid.columns]
        return shown


def read_segments(
    source: Path | bytes | np.ndarray | torch.Tensor,
    sampling: Sampling,
    transform: ImageTransform | VideoTransform,
    threads: DecoderThreads | None = None,
    store: FrameStore = ON_HOST,
) -> tuple[VideoReport, Iterator[DecodedSegment]]:
    """Open a video. Return a report, which is filled in as segments are read, and the segments.

    A video model gets clips, an image model single frames, `sampling.every` seconds apart. A clip
    in memory that has as many frames as the model takes is the model's clip; its frames stay on
    the device that they lie on. For `threads`, see `Video`. `store` says where frames are kept.

    Raises:
        InputError: See `Video`. The iterator raises it if too many frames are damaged.
    """
    video: AnyVideo
    if isinstance(source, np.ndarray | torch.Tensor):
        video = FrameArray(source)
        if isinstance(transform, VideoTransform) and video.frames == transform.frames:
            transform = replace(transform, stride=1, fps=video.fps)
    else:
        reader = _reader_for(sampling, transform, store)
        video = open_video(source, sampling.max_pixels, threads, reader)
    notes = video.notes
    if not video.declares_length:
        notes += ("its format declares no length, so truncation cannot be detected",)
    report = VideoReport(video.duration, video.fps, video.frames, notes=notes)
    if isinstance(transform, ImageTransform):
        assert sampling.every is not None
        return report, _single_frames(video, sampling.every, transform, report)
    stride, fps = sampling.stride or transform.stride, sampling.fps or transform.fps
    return report, _clips(
        video, sampling, replace(transform, stride=stride, fps=fps), report, store
    )


def _reader_for(
    sampling: Sampling, transform: ImageTransform | VideoTransform, store: FrameStore
) -> VideoOpener:
    """Return what opens video files."""
    if sampling.decoder == "torchcodec":
        return TorchcodecVideo
    if isinstance(transform, ImageTransform) or not store.takes_planes:
        return Video
    crops, size = sampling.views[1], transform.size
    return functools.partial(PlanarVideo, keeps=lambda layout: keeps_planes(layout, size, crops))


def _clips(
    video: AnyVideo,
    sampling: Sampling,
    transform: VideoTransform,
    report: VideoReport,
    store: FrameStore,
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
            size = transform.size
            on_device = _frames_on_device(video, wanted, crops, size, report)
            frames, grid, layout = on_device or _read_frames(
                video, wanted.tolist(), crops, size, report, store
            )
            clip_rows = rows.reshape(indices.shape)
            shown: Sequence[np.ndarray] | np.ndarray
            if frames.dtype in (np.uint8, torch.uint8):
                views = ClipViews(frames, clip_rows, grid.corners, size, grid.scaled, layout)
                shown = ResizedFrames(frames, grid, layout)
            else:
                assert isinstance(frames, np.ndarray)
                views, shown = ClipViews(frames, clip_rows, grid.boxes, size), frames
            report.views += len(views)
            times = (wanted / video.fps).tolist()
            yield DecodedSegment(first / video.fps, last / video.fps, views, shown, times)


def _frames_on_device(
    video: AnyVideo,
    wanted: np.ndarray,
    crops: int,
    size: tuple[int, int],
    report: VideoReport,
) -> tuple[torch.Tensor, CropGrid, None] | None:
    """Return the frames of a clip that lies on a device, as they are there; None for other videos,
    and for very long frames, of which only a part is resized."""
    if not isinstance(video, FrameArray) or not isinstance(video.pixels, torch.Tensor):
        return None
    height, width = video.pixels.shape[1:3]
    grid = CropGrid.for_crops(height, width, size, crops)
    if is_long(grid):
        return None
    report.used += len(wanted)
    first, last = int(wanted[0]), int(wanted[-1])
    if last - first + 1 == len(wanted):  # all frames of a range: nothing is copied
        return video.pixels[first : last + 1], grid, None
    return video.pixels[torch.from_numpy(wanted).to(video.pixels.device)], grid, None


def _read_frames(
    video: AnyVideo,
    wanted: list[int],
    crops: int,
    size: tuple[int, int],
    report: VideoReport,
    store: FrameStore,
) -> tuple[np.ndarray, CropGrid, YuvLayout | None]:
    """Decode frames, and keep them: see `KeptFrames`."""
    kept, damaged = KeptFrames(store, len(wanted), size, crops), 0
    for row, decoded in enumerate(video.read(wanted)):
        kept.put(row, decoded)
        damaged += not decoded.intact
    report.used += len(wanted)
    report.damaged += damaged
    check_damage(damaged, len(wanted))
    assert kept.frames is not None
    return kept.frames, kept.grid, kept.layout


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
