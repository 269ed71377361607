"""Read frames of a video by index: seek, decode only what is needed, and detect damaged frames.

Times are in seconds from the first frame. Frame `i` of a video is the frame that a viewer sees at
time `i / fps`, where `fps` is the average frame rate. At a constant rate that is the i-th frame.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from ..errors import InputError
from .image_reader import MAX_PIXELS

# Only these containers are opened, whatever the file extension is. FFmpeg's playlists (hls,
# concat) would read other files and URLs.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,h264,hevc,m4v,mxf,dv,nut"
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
# Formats without an index. FFmpeg only guesses their length, and they have too few time stamps to
# seek by, so they are read from start to end.
NO_INDEX_FORMATS = ("mpeg", "mpegvideo", "h264", "hevc", "m4v")
# Formats without a length. A truncated file looks like a shorter video.
NO_LENGTH_FORMATS = ("mpegts", *NO_INDEX_FORMATS)
SEEK_GAP_S = 1.0  # seek over longer gaps than this; decode through shorter ones
# How many seconds before the target to seek, tried in this order until a seek lands early enough.
STEPS_BACK_S = (0.0, 2.0, 10.0, 60.0)
MAX_RATE = 1000  # frames per second; a higher declared rate is an error in the file
FALLBACK_RATE = 30.0
MAX_DAMAGED = 0.1  # largest share of frames that may be damaged or lost


@dataclass(frozen=True)
class DecodedFrame:
    """One frame of a video."""

    index: int  # the index that was requested
    pixels: np.ndarray  # uint8 [height, width, 3], upright
    intact: bool  # False if the frame is damaged, or stands in for one that is lost


class Video:
    """An open video. Use it as a context manager, from one thread at a time.

    Args:
        source: A path, or the bytes of the file.
        max_pixels: A video with more pixels per frame is refused, before any frame is decoded.

    Attributes:
        frames: Number of frames, as the file declares it, or counted if it declares none.
        fps: Average frame rate.
        width, height: Size of a frame in pixels, before rotation.

    Raises:
        InputError: The file is missing, damaged, too large, or has no video stream.
    """

    def __init__(self, source: Path | bytes, max_pixels: int = MAX_PIXELS) -> None:
        self._file = source
        with _as_input_errors():
            self._open()
        try:
            with _as_input_errors():
                self._check(max_pixels)
                self._measure()
        except BaseException:
            self.close()
            raise
        self._tolerance = 0.25 / self.fps  # time stamps are rounded to the container's ticks
        self._reformatter = VideoReformatter()  # shared by all frames, because setup is slow
        self._current: Any = None  # the frame that is shown now
        self._next: Any = None  # the frame after it
        self._decoded: Iterator[Any] = iter(())  # the frames after that
        self._packet_times: list[float] = []  # sorted; of the packets read since the last seek

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    @property
    def declares_length(self) -> bool:
        """Whether the container declares its length, so that truncation is noticed."""
        return self._container.format.name not in NO_LENGTH_FORMATS

    @property
    def duration(self) -> float:
        """Duration in seconds."""
        return self.frames / self.fps

    def read(self, indices: Sequence[int]) -> Iterator[DecodedFrame]:
        """Yield frames by index, in ascending order. At most two frames are in memory at a time.

        Raises:
            InputError: No frame can be decoded.
        """
        for index in indices:
            with _as_input_errors():
                yield self._read_frame(index)

    # Opening ----------------------------------------------------------------------------------

    def _open(self) -> None:
        file: Any = io.BytesIO(self._file) if isinstance(self._file, bytes) else str(self._file)
        self._container = av.open(file, options=OPTIONS, metadata_errors="replace")
        streams = [s for s in self._container.streams.video if not _is_cover_art(s)]
        self._stream: Any = streams[0] if streams else None
        self._at_start = True
        if self._stream is not None and self._stream.codec_context is not None:
            self._stream.thread_type = "AUTO"

    def _check(self, max_pixels: int) -> None:
        """Check that the video can be decoded, and set its size and its time base."""
        stream = self._stream
        if stream is None:
            raise InputError("no video stream", "the file holds only sound or subtitles")
        if stream.codec_context is None:
            raise InputError("unknown video codec", "convert the video, to H.264 for example")
        self.width, self.height = stream.codec_context.width, stream.codec_context.height
        if self.width * self.height > max_pixels:
            raise InputError(
                f"{self.width}x{self.height} pixels are more than {max_pixels}",
                "raise --max-pixels if you trust it",
            )
        self._tick = float(stream.time_base or 1 / 90_000)
        self._start = (stream.start_time or 0) * self._tick

    def _measure(self) -> None:
        """Get the number of frames and the frame rate from the headers, or from all packets."""
        stream = self._stream
        rate = stream.average_rate or stream.guessed_rate
        self._seekable = self._container.format.name not in NO_INDEX_FORMATS
        seconds = self._declared_seconds() if self._seekable else 0.0
        if rate and 0 < rate < MAX_RATE and (stream.frames or seconds):
            self.fps = float(rate)
            self.frames = stream.frames or max(1, round(seconds * self.fps))
        else:
            times = sorted(self._time(p) for p in self._packets())
            self.frames = max(1, len(times))
            span = times[-1] - times[0] if times else 0.0
            plausible = span > 0 and (len(times) - 1) / span < MAX_RATE
            self.fps = (len(times) - 1) / span if plausible else FALLBACK_RATE
            self._start = times[0] + self._start if times else self._start
        base = stream.base_rate
        self._constant_rate = bool(rate and base and abs(float(base / rate) - 1) < 1e-3)

    def _declared_seconds(self) -> float:
        """Return the length of the video stream, or 0 if it is not declared.

        The container's own length may be that of the audio.
        """
        stream, container = self._stream, self._container
        if stream.duration:
            return float(stream.duration * self._tick)
        if (tag := _parse_seconds(stream.metadata.get("DURATION", ""))) is not None:
            return tag - self._start  # Matroska's tag is the time at which the last frame ends
        if not container.duration:
            return 0.0
        declared = container.duration / av.time_base
        if len(container.streams) == 1:
            return declared
        ends = self._stream_ends(declared)
        reaches_end = max(ends.values(), default=0.0) > declared - 1.0
        return ends.get(stream.index, declared) if reaches_end else declared

    def _stream_ends(self, declared: float) -> dict[int, float]:
        """Return the time at which each stream ends, from the packets of the last seconds."""
        ends: dict[int, float] = {}
        with contextlib.suppress(av.FFmpegError):
            self._at_start = False
            self._container.seek(int(max(0.0, declared - 5) * av.time_base))
            for packet in self._container.demux():
                if packet.pts is not None:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    ends[packet.stream.index] = max(ends.get(packet.stream.index, 0.0), end)
        return {index: end - self._start for index, end in ends.items()}

    # Reading ----------------------------------------------------------------------------------

    def _read_frame(self, index: int) -> DecodedFrame:
        time = index / self.fps
        passed = self._current is None or time < self._time(self._current) - self._tolerance
        if passed or (self._seekable and time - self._time(self._current) > SEEK_GAP_S):
            self._seek(time)
        self._advance(time)
        frame = self._current if self._current is not None else self._next
        if frame is None:
            raise InputError("no frame can be decoded", "the file is damaged or truncated")
        return DecodedFrame(index, self._pixels(frame), self._is_intact(frame, time))

    def _seek(self, time: float) -> None:
        """Go to a key frame at or before `time`. If a seek lands after it, seek further back."""
        for back in (*STEPS_BACK_S, time + 1.0):
            self._restart(time - back)
            self._next = next(self._decoded, None)
            if self._next is not None and self._time(self._next) <= time + self._tolerance:
                return
            if time - back <= 0:
                return

    def _restart(self, time: float) -> None:
        """Decode from a key frame at or before `time`, or from the start if seeking fails."""
        try:
            if time > 0 and self._seekable:
                target = int((time + self._start) / self._tick)
                self._container.seek(target, stream=self._stream, backward=True)
                self._at_start = False
        except av.FFmpegError:  # no index
            time = 0.0
        from_start = time <= 0 or not self._seekable
        if from_start and not self._at_start:  # a seek to the start may miss the first key frame
            self.close()
            self._open()
        self._current = self._next = None
        self._packet_times = []
        self._decoded = self._decode()

    def _advance(self, time: float) -> None:
        """Decode until the next frame is later than `time`."""
        while self._next is not None and self._time(self._next) <= time + self._tolerance:
            self._current, self._next = self._next, next(self._decoded, None)

    def _decode(self) -> Iterator[Any]:
        """Yield the frames from here on. Frames that cannot be decoded are skipped."""
        last = None
        for packet in itertools.chain(self._packets(), [None]):  # None flushes the decoder
            if packet is not None:
                bisect.insort(self._packet_times, self._time(packet))
                del self._packet_times[:-512]
            try:
                decoded = self._stream.codec_context.decode(packet)
            except av.FFmpegError:
                continue
            for frame in decoded:
                if frame.pts is None:  # AVI without time stamps: frames follow one another
                    frame.pts = frame.dts if frame.dts is not None else self._pts_after(last)
                last = frame
                yield frame

    def _packets(self) -> Iterator[Any]:
        """Yield the packets of the stream for as long as they can be read."""
        self._at_start = False
        with contextlib.suppress(av.FFmpegError):
            yield from (p for p in self._container.demux(self._stream) if p.size)

    def _is_intact(self, frame: Any, time: float) -> bool:
        """Return whether `frame` is undamaged and is the frame that belongs at `time`."""
        start, interval = self._time(frame), 1 / self.fps
        count = bisect.bisect_right(self._packet_times, time + self._tolerance)
        # A later frame than this one was read from the file, but could not be decoded.
        undecoded = count and self._packet_times[count - 1] - start > 0.5 * interval
        lasts = max(interval, self._usual_interval(), float((frame.duration or 0) * self._tick))
        is_over = time + 0.5 * self._tolerance >= start + lasts
        # The next frame should be shown by now, but it is missing from the file.
        missing = is_over and (self._next is None or self._constant_rate)
        too_late = start > time + 1.5 * interval
        return not (frame.is_corrupt or undecoded or missing or too_late)

    def _usual_interval(self) -> float:
        """Return the median time between recent frames; the declared rate may be wrong."""
        recent = self._packet_times[-64:]
        return float(np.median(np.diff(recent))) if len(recent) > 2 else 0.0

    def _pixels(self, frame: Any) -> np.ndarray:
        """Return upright RGB at the declared size, because the size may change within a stream."""
        rgb = self._reformatter.reformat(frame, self.width, self.height, "rgb24")
        pixels = rgb.to_ndarray()
        return np.rot90(pixels, round(frame.rotation / 90)) if frame.rotation else pixels

    def _time(self, item: Any) -> float:
        """Return the time of a frame or packet."""
        stamp = item.pts if item.pts is not None else item.dts
        return (stamp or 0) * self._tick - self._start

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


def _parse_seconds(text: str) -> float | None:
    """`00:01:02.500000000` -> 62.5; None if there is no such text."""
    parts = text.split(":")
    try:
        return sum(float(p) * 60**i for i, p in enumerate(reversed(parts))) if text else None
    except ValueError:
        return None
