"""Read frames of a video by index: seek, decode only what is needed, and detect damaged frames.

Times are in seconds from the first frame. Frame `i` of a video is the frame that a viewer sees at
time `i / fps`, where `fps` is the average frame rate. At a constant rate that is the i-th frame.
Every frame is the one that decoding the file from its start gives.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from ...errors import InputError
from ..image_reader import MAX_PIXELS
from . import decoder_threads
from .decoder_threads import DecoderThreads
from .frame_colours import frame_to_rgb
from .video_timeline import read_timeline, stamp_of
from .yuv_layout import YuvLayout

# Only these containers are opened, whatever the file extension is. FFmpeg's playlists (hls,
# concat) would read other files and URLs.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,h264,hevc,m4v,mxf,dv,nut"
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
ROUNDING_PIXELS = 1 << 23  # more than any rounding of the sides, at most 65,535, to blocks adds
SEEK_GAP_S = 1.0  # seek over longer gaps than this; decode through shorter ones
# How many seconds before the target to seek, tried in this order until a seek lands early enough.
STEPS_BACK_S = (0.0, 2.0, 10.0, 60.0)
# Some files of these have other pixels if FFmpeg decodes them in several threads.
ONE_THREAD_CODECS = ("vp3", "theora", "vp4")
MAX_DAMAGED = 0.1  # largest share of frames that may be damaged or lost


@dataclass(frozen=True)
class DecodedFrame:
    """One frame of a video."""

    index: int  # the index that was requested
    pixels: np.ndarray  # uint8 [height, width, 3], upright; or [bytes], with a layout
    intact: bool  # False if the frame is damaged, or stands in for one that is lost
    layout: YuvLayout | None = None  # of planes, see `PlanarVideo`


@dataclass(frozen=True)
class _Shown:
    """A decoded frame, and when it is shown."""

    time: float
    frame: Any
    intact: bool  # False if this frame, or one that it depends on, is damaged


class Video:
    """An open video. Use it as a context manager, from one thread at a time.

    Args:
        source: A path, or the bytes of the file.
        max_pixels: A video with more pixels per frame is refused, before any frame is decoded; or
            at the first larger frame, if the size changes within the stream.
        threads: The threads that this and other open videos share. None: those of the process.

    Attributes:
        frames: Number of frames, counted unless the header lists them all. Frames that are missing
            at the end of a file that was cut off are included.
        fps: Average frame rate.
        width, height: Size of a frame in pixels, before rotation.
        declares_length: Whether the file declares its length, so that truncation is noticed.
        notes: What the header says wrongly.

    Raises:
        InputError: The file is missing, damaged, too large, or has no video stream.
    """

    def __init__(
        self,
        source: Path | bytes,
        max_pixels: int = MAX_PIXELS,
        threads: DecoderThreads | None = None,
    ) -> None:
        self._file, self._max_pixels = source, max_pixels
        self._threads, self._has_threads = threads or decoder_threads.OF_THIS_PROCESS, False
        self._is_damaged = False  # then one thread decodes
        with _as_input_errors():
            self._open()
        try:
            with _as_input_errors():
                self._check()
                self._measure()
        except BaseException:
            self.close()
            raise
        # Time stamps are rounded to the container's ticks, and sums of floats are rounded too.
        self._tolerance = 0.25 / self.fps + 1e-6
        self._reformatter = VideoReformatter()
        self._is_disordered = False  # whether time stamps contradict the order of the frames
        self._current: _Shown | None = None  # the frame that is shown now
        self._next: _Shown | None = None  # the frame after it
        self._decoded: Iterator[_Shown] = iter(())  # the frames after that
        self._source: Iterator[Any] = iter(())  # the packets that are still to be decoded
        self._first_time = 0.0  # frames before this one depend on frames that were not read
        self._packet_times: list[float] = []  # sorted; of the packets read since the last seek

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and end the threads of its decoder."""
        # The generators refer to this object, and the decoder lives as long as it does.
        self._decoded = self._source = iter(())
        self._current = self._next = None
        self._container.close()
        if self._has_threads:
            self._threads.give_back()
            self._has_threads = False

    @property
    def duration(self) -> float:
        """Duration in seconds."""
        return self.frames / self.fps

    def read(self, indices: Sequence[int]) -> Iterator[DecodedFrame]:
        """Yield frames by index. Ascending order is fast. At most two frames are in memory at once.

        Raises:
            InputError: No frame can be decoded, or more than a tenth of all frames are missing at
                the end of the file.
        """
        if self._timeline.present is not None:
            check_damage(self.frames - self._timeline.present, self.frames)
        for index in indices:
            with _as_input_errors():
                yield self._read_frame(index)

    # Opening ----------------------------------------------------------------------------------

    def _open(self) -> None:
        file: Any = (
            # Absolute, because FFmpeg takes `a:b.mp4` for a protocol named `a`.
            io.BytesIO(self._file) if isinstance(self._file, bytes) else str(self._file.absolute())
        )
        self._container = av.open(file, options=OPTIONS, metadata_errors="replace")
        streams = [s for s in self._container.streams.video if not _is_cover_art(s)]
        self._stream: Any = streams[0] if streams else None
        self._at_start = True
        if self._stream is not None and self._stream.codec_context is not None:
            self._stream.thread_type = "AUTO"
            self._thread_count, self._has_threads = self._threads.take(), True
            if self._is_damaged or self._stream.codec_context.name in ONE_THREAD_CODECS:
                self._thread_count = 1
            self._stream.codec_context.thread_count = self._thread_count
            # A decoder rounds sizes up before it compares them, so `_decode` checks more exactly.
            limit = min(self._max_pixels + ROUNDING_PIXELS, 2**31 - 1)
            self._stream.codec_context.options = {"max_pixels": str(limit)}

    def _check(self) -> None:
        """Check that the video can be decoded, and set its size and its time base."""
        stream = self._stream
        if stream is None:
            raise InputError("no video stream", "the file holds only sound or subtitles")
        if stream.codec_context is None:
            raise InputError("unknown video codec", "convert the video, to H.264 for example")
        self.width, self.height = stream.codec_context.width, stream.codec_context.height
        self._check_size(self.width, self.height)
        self._tick = float(stream.time_base or 1 / 90_000)
        self._reorders = bool(stream.codec_context.has_b_frames)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise InputError(
                f"{width}x{height} pixels are more than {self._max_pixels}",
                "raise --max-pixels if you trust it",
            )

    def _measure(self) -> None:
        """Get the number of frames and the frame rate."""
        self._timeline = timeline = read_timeline(self._container, self._stream)
        self._at_start = timeline.present is None  # else the file has been read to count frames
        self._seekable = not timeline.in_order
        self.frames, self.fps, self.notes = timeline.frames, timeline.fps, timeline.notes
        self.declares_length = timeline.declares_length

    # Reading ----------------------------------------------------------------------------------

    def _read_frame(self, index: int) -> DecodedFrame:
        time = index / self.fps
        shown, intact = self._show(time)
        if not intact and self._thread_count > 1:
            # How damage is concealed depends on the number of threads.
            self._is_damaged, self._at_start = True, False  # so that the file is opened again
            shown, intact = self._show_from_start(time)
        elif not intact and self._seekable and self._has_sought:
            # Seeking can land within a group of frames that depend on earlier ones. Frames of an
            # undamaged file are found in any case if the file is read from its start.
            shown, intact = self._show_from_start(time)
        if self._is_disordered and not self._timeline.in_order:
            self._timeline = replace(self._timeline, in_order=True)
            shown, intact = self._show_from_start(time)
        if shown is None:
            raise InputError("no frame can be decoded", "the file is damaged or truncated")
        present = self._timeline.present
        is_lost = present is not None and index >= present
        return self._output(index, shown.frame, intact and not is_lost)

    def _show(self, time: float) -> tuple[_Shown | None, bool]:
        """Return the frame that is shown at `time`, and whether it is undamaged."""
        if self._needs_seek(time):
            self._seek(time)
        while self._next is not None and self._next.time <= time + self._tolerance:
            self._current, self._next = self._next, next(self._decoded, None)
        shown = self._current or self._next
        return shown, shown is not None and self._is_intact(shown, time)

    def _show_from_start(self, time: float) -> tuple[_Shown | None, bool]:
        """Do what `_show` does, without seeking, from now on."""
        self._seekable, self._current, self._next = False, None, None
        return self._show(time)

    def _needs_seek(self, time: float) -> bool:
        """Return whether the frame at `time` is behind, or far ahead with a key frame between."""
        if self._current is None or time < self._current.time - self._tolerance:
            return True
        if not self._seekable or time - self._current.time <= SEEK_GAP_S:
            return False
        keys = self._timeline.keys
        return not keys or self._key_time(self._key_before(time)) > self._current.time

    def _seek(self, time: float) -> None:
        """Go to a key frame at or before `time`, or to the start of the file if that fails."""
        if self._seekable and time > 0:
            key = self._key_before(time) if self._timeline.keys else None
            target = time if key is None else self._key_time(key)
            for back in STEPS_BACK_S:
                if target - back <= 0 or not self._seek_to(target - back):
                    break
                self._start_decoding(key)
                if self._next is not None and self._next.time <= time + self._tolerance:
                    if self._next.frame.key_frame:
                        return
                    break  # the index is wrong
        if not self._at_start:  # seeking to the start could miss the first key frame
            self.close()
            self._open()
        self._has_sought = False
        self._start_decoding(None)

    def _seek_to(self, time: float) -> bool:
        """Seek to a key frame at or before `time`, and return whether the container can."""
        self._at_start, self._has_sought = False, True
        try:
            target = round((time + self._timeline.start) / self._tick)
            self._container.seek(target, stream=self._stream, backward=True)
        except av.FFmpegError:  # no index
            return False
        return True

    def _start_decoding(self, key: int | None) -> None:
        """Decode from here on, or from the packet with the time stamp `key`."""
        self._current, self._packet_times = None, []
        packets = self._packets()
        self._source = packets if key is None else _from_key(packets, key)
        self._first_time = -1.0 if key is None else self._key_time(key)
        self._decoded = self._decode()
        self._next = next(self._decoded, None)

    def _key_before(self, time: float) -> int:
        """Return the time stamp, in ticks, of the last key frame at or before `time`."""
        keys = self._timeline.keys
        ticks = (time + self._tolerance + self._timeline.start) / self._tick
        return keys[max(0, bisect.bisect_right(keys, ticks) - 1)]

    def _key_time(self, key: int) -> float:
        return key * self._tick - self._timeline.start

    def _decode(self) -> Iterator[_Shown]:
        """Yield the frames of `self._source`. Frames that cannot be decoded are skipped."""
        in_order, last, count = self._timeline.in_order, None, 0
        intact = True
        for number, packet in enumerate(itertools.chain(self._source, [None])):  # None: flush
            # An edit list has the packets before a cut decoded, but not shown.
            if packet is not None and not packet.is_discard:
                time = number / self.fps if in_order else self._time(packet)
                bisect.insort(self._packet_times, time)
                del self._packet_times[:-512]
            try:
                decoded = self._stream.codec_context.decode(packet)
            except av.FFmpegError:
                intact = False
                continue
            for frame in decoded:
                self._check_size(frame.width, frame.height)
                # What is damaged stays so up to the next key frame. FFmpeg marks the first frame.
                intact = not frame.is_corrupt and (intact or frame.key_frame)
                if in_order:
                    yield _Shown(count / self.fps, frame, intact)
                    count += 1
                    continue
                if frame.pts is None:  # AVI without time stamps: frames follow one another
                    frame.pts = frame.dts if frame.dts is not None else self._pts_after(last)
                time = self._time(frame)
                if last is not None:
                    self._is_disordered |= time < self._time(last)
                    if self._lost_between(self._time(last), time) and not frame.key_frame:
                        intact = False
                last = frame
                if time >= self._first_time - self._tolerance:
                    yield _Shown(time, frame, intact)

    def _packets(self) -> Iterator[Any]:
        """Yield the packets of the stream for as long as they can be read."""
        self._at_start = False
        with contextlib.suppress(av.FFmpegError):
            yield from (p for p in self._container.demux(self._stream) if p.size)

    def _is_intact(self, shown: _Shown, time: float) -> bool:
        """Return whether a frame is undamaged and is the one that belongs at `time`."""
        start, interval = shown.time, 1 / self.fps
        count = bisect.bisect_right(self._packet_times, time + self._tolerance)
        # A later frame than this one was read from the file, but could not be decoded.
        undecoded = count and self._packet_times[count - 1] - start > 0.5 * interval
        duration = float((shown.frame.duration or 0) * self._tick)
        lasts = max(interval, self._usual_interval(), duration)
        is_over = time + 0.5 * self._tolerance >= start + lasts
        # The next frame should be shown by now, but it is missing from the file.
        missing = is_over and (self._next is None or self._timeline.constant_rate)
        too_late = start > time + 1.5 * interval
        # Frames that depend on the next one (B-frames) are shown before it.
        doubtful = self._next is not None and self._next.frame.is_corrupt and self._reorders
        return shown.intact and not (doubtful or undecoded or missing or too_late)

    def _lost_between(self, before: float, after: float) -> bool:
        """Return whether a packet was read whose time is between those of two frames."""
        margin = 0.5 / self.fps
        number = bisect.bisect_right(self._packet_times, before + margin)
        return number < bisect.bisect_left(self._packet_times, after - margin)

    def _usual_interval(self) -> float:
        """Return the median time between recent frames; the declared rate may be wrong."""
        recent = self._packet_times[-64:]
        return float(np.median(np.diff(recent))) if len(recent) > 2 else 0.0

    def _output(self, index: int, frame: Any, intact: bool) -> DecodedFrame:
        """Return upright RGB at the declared size, because the size may change within a stream."""
        pixels = frame_to_rgb(self._reformatter, frame, self.width, self.height)
        if frame.rotation:
            pixels = np.rot90(pixels, round(frame.rotation / 90))
        return DecodedFrame(index, pixels, intact)

    def _time(self, item: Any) -> float:
        """Return the time of a frame or packet."""
        return (stamp_of(item) or 0) * self._tick - self._timeline.start

    def _pts_after(self, frame: Any) -> int:
        """Return the time stamp, in ticks, of the frame that follows `frame` (None: the first)."""
        step = round(1 / self.fps / self._tick)
        return 0 if frame is None else int(frame.pts + max(1, step))


def check_damage(damaged: int, wanted: int) -> None:
    """Check how many of the requested frames are damaged or lost.

    Raises:
        InputError: More than a tenth of them are.
    """
    if damaged > MAX_DAMAGED * wanted:
        raise InputError(
            f"{damaged} of {wanted} frames are damaged or lost",
            "the file is damaged or cut off; fetch it again",
        )


@contextlib.contextmanager
def _as_input_errors() -> Iterator[None]:
    """Convert errors of FFmpeg and of the file system to an InputError."""
    try:
        yield
    except InputError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError((error.strerror or str(error)).lower(), "check the path") from error
    except MemoryError as error:
        raise InputError("too large for this machine's memory") from error
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, LookupError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
        raise InputError(reason, "the file is damaged, truncated, or not a video") from error


def _is_cover_art(stream: Any) -> bool:
    """Return whether a stream is the cover of an audio file, which FFmpeg lists as a video."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _from_key(packets: Iterator[Any], key: int) -> Iterator[Any]:
    """Return the packets from the key frame at `key` on; none if a later one comes first."""
    for packet in packets:
        stamp = stamp_of(packet)
        if stamp == key:
            return itertools.chain([packet], packets)
        if packet.is_keyframe and stamp is not None and stamp > key:
            break
    return iter(())
