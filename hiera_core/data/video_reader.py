"""Frames of a video by time: open safely, seek, decode only what is asked for, count the damage.

A time here is in seconds from the first frame. Frame `i` of a video is the one shown at `i / fps`,
fps being the average rate: at a constant rate that is the i-th frame, at a variable one it is what
a viewer sees.
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

# Content decides, and only these containers are opened: FFmpeg's playlists (hls, concat, ...) read
# other files and addresses.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,h264,hevc,m4v,mxf,dv,nut"
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
# No length in them, only FFmpeg's guess, and too few time stamps to seek by: read through.
UNMEASURED = ("mpeg", "mpegvideo", "h264", "hevc", "m4v")
UNDECLARED = ("mpegts", *UNMEASURED)  # a file that was cut off looks like a shorter one
SEEK_GAP_S = 1.0  # decode on over shorter gaps than this, seek over longer ones
STEPS_BACK_S = (0.0, 2.0, 10.0, 60.0)  # where to look when a seek lands too late
MAX_RATE = 1000  # frames a second; declared rates above are no rates
FALLBACK_RATE = 30.0


@dataclass(frozen=True)
class DecodedFrame:
    """The frame that is shown at one of the asked-for places."""

    index: int
    pixels: np.ndarray  # uint8 [height, width, 3], upright
    intact: bool  # False: damaged, or another frame in place of one that is lost


class Video:
    """An open video. Use it as a context manager, from one thread at a time.

    Attributes:
        frames: how many there are, as declared (or counted where nothing is declared).
        fps: their average rate.
        width, height: in pixels, before rotation.

    Raises:
        InputError: missing, no video, no video stream, damaged, or too large.
    """

    def __init__(self, source: Path | bytes, max_pixels: int = MAX_PIXELS) -> None:
        self._file = source
        with _faults():
            self._open()
        try:
            with _faults():
                self._check(max_pixels)
                self._measure()
        except BaseException:
            self.close()
            raise
        self._slack = 0.25 / self.fps  # time stamps are rounded to the container's ticks
        self._reformatter = VideoReformatter()  # one for all frames: setting it up takes longest
        self._frame: Any = None  # shown now
        self._next: Any = None  # the first one after it
        self._source: Iterator[Any] = iter(())
        self._packet_times: list[float] = []  # of the packets read since the last seek

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()

    @property
    def declares_length(self) -> bool:
        """Whether the container says how long it is, so that a cut shows."""
        return self._container.format.name not in UNDECLARED

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.fps

    def read(self, wanted: Sequence[int]) -> Iterator[DecodedFrame]:
        """Frames by number, ascending. Seeks over gaps; never holds more than two frames.

        Raises:
            InputError: not one frame can be decoded.
        """
        for index in wanted:
            with _faults():
                yield self._at(index)

    # Opening ----------------------------------------------------------------------------------

    def _open(self) -> None:
        file: Any = io.BytesIO(self._file) if isinstance(self._file, bytes) else str(self._file)
        self._container = av.open(file, options=OPTIONS, metadata_errors="replace")
        streams = [s for s in self._container.streams.video if not _is_cover(s)]
        self._stream: Any = streams[0] if streams else None
        self._at_start = True
        if self._stream is not None and self._stream.codec_context is not None:
            self._stream.thread_type = "AUTO"

    def _check(self, max_pixels: int) -> None:
        stream = self._stream
        if stream is None:
            raise InputError("no video stream", "it holds sound or subtitles only")
        if stream.codec_context is None:
            raise InputError("an unknown codec", "convert the video, to H.264 for example")
        self.width, self.height = stream.codec_context.width, stream.codec_context.height
        if self.width * self.height > max_pixels:
            raise InputError(
                f"{self.width}x{self.height} pixels are more than {max_pixels}",
                "raise --max-pixels if you trust it",
            )
        self._tick = float(stream.time_base or 1 / 90_000)
        self._start = (stream.start_time or 0) * self._tick

    def _measure(self) -> None:
        """How many frames at which rate: from the headers, else by reading all packets."""
        stream = self._stream
        rate = stream.average_rate or stream.guessed_rate
        self._seekable = self._container.format.name not in UNMEASURED
        seconds = self._declared_seconds() if self._seekable else 0.0
        if rate and 0 < rate < MAX_RATE and (stream.frames or seconds):
            self.fps = float(rate)
            self.frames = stream.frames or max(1, round(seconds * self.fps))
        else:
            times = sorted(self._time(p) for p in self._packets())
            self.frames = max(1, len(times))
            span = times[-1] - times[0] if times else 0.0
            known = span > 0 and (len(times) - 1) / span < MAX_RATE
            self.fps = (len(times) - 1) / span if known else FALLBACK_RATE
            self._start = times[0] + self._start if times else self._start
        base = stream.base_rate
        self._constant = bool(rate and base and abs(float(base / rate) - 1) < 1e-3)

    def _declared_seconds(self) -> float:
        """Length of the video stream. A container's length may be that of its sound."""
        stream, container = self._stream, self._container
        if stream.duration:
            return float(stream.duration * self._tick)
        if (tag := _seconds(stream.metadata.get("DURATION", ""))) is not None:
            return tag - self._start  # Matroska: where the last frame ends
        if not container.duration:
            return 0.0
        declared = container.duration / av.time_base
        if len(container.streams) == 1:
            return declared
        ends = self._ends(declared)
        reaches_end = max(ends.values(), default=0.0) > declared - 1.0
        return ends.get(stream.index, declared) if reaches_end else declared

    def _ends(self, declared: float) -> dict[int, float]:
        """Where each stream ends, from its last packets."""
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

    def _at(self, index: int) -> DecodedFrame:
        time = index / self.fps
        behind = self._frame is None or time < self._time(self._frame) - self._slack
        if behind or (self._seekable and time - self._time(self._frame) > SEEK_GAP_S):
            self._seek(time)
        self._advance(time)
        frame = self._frame if self._frame is not None else self._next
        if frame is None:
            raise InputError("no frame can be decoded", "the file is damaged or cut off")
        return DecodedFrame(index, self._pixels(frame), self._is_intact(frame, time))

    def _seek(self, time: float) -> None:
        """Go to a key frame at or before `time`; further back where that lands after it."""
        for back in (*STEPS_BACK_S, time + 1.0):
            self._restart(time - back)
            self._next = next(self._source, None)
            if self._next is not None and self._time(self._next) <= time + self._slack:
                return
            if time - back <= 0:
                return

    def _restart(self, time: float) -> None:
        try:
            if time > 0 and self._seekable:
                target = int((time + self._start) / self._tick)
                self._container.seek(target, stream=self._stream, backward=True)
                self._at_start = False
        except av.FFmpegError:  # no index
            time = 0.0
        if (
            time <= 0 or not self._seekable
        ) and not self._at_start:  # seeking to the start may miss the first key frame
            self.close()
            self._open()
        self._frame = self._next = None
        self._packet_times = []
        self._source = self._decode()

    def _advance(self, time: float) -> None:
        """Decode until the next frame comes after `time`."""
        while self._next is not None and self._time(self._next) <= time + self._slack:
            self._frame, self._next = self._next, next(self._source, None)

    def _decode(self) -> Iterator[Any]:
        """Frames from here on; what cannot be decoded is left out."""
        last = None
        for packet in itertools.chain(self._packets(), [None]):  # None: what the decoder holds back
            if packet is not None:
                bisect.insort(self._packet_times, self._time(packet))
                del self._packet_times[:-512]
            try:
                decoded = self._stream.codec_context.decode(packet)
            except av.FFmpegError:
                continue
            for frame in decoded:
                if frame.pts is None:  # AVI without time stamps: they follow each other
                    frame.pts = frame.dts if frame.dts is not None else _after(last, self)
                last = frame
                yield frame

    def _packets(self) -> Iterator[Any]:
        """Packets of the stream, for as long as they can be read."""
        self._at_start = False
        with contextlib.suppress(av.FFmpegError):
            yield from (p for p in self._container.demux(self._stream) if p.size)

    def _is_intact(self, frame: Any, time: float) -> bool:
        """Whether this is the frame that belongs here, whole."""
        shown, width = self._time(frame), 1 / self.fps
        before = bisect.bisect_right(self._packet_times, time + self._slack)
        lost = before and self._packet_times[before - 1] - shown > 0.5 * width
        lasts = max(width, self._usual_gap(), float((frame.duration or 0) * self._tick))
        another = time + 0.5 * self._slack >= shown + lasts  # should be shown by now
        gap = another and (self._next is None or self._constant)
        late = shown > time + 1.5 * width
        return not (frame.is_corrupt or lost or gap or late)

    def _usual_gap(self) -> float:
        """Between frames around here: a rate may be declared and not kept."""
        lately = self._packet_times[-64:]
        return float(np.median(np.diff(lately))) if len(lately) > 2 else 0.0

    def _pixels(self, frame: Any) -> np.ndarray:
        """RGB, upright, at the size of the stream (it may change half-way)."""
        rgb = self._reformatter.reformat(frame, self.width, self.height, "rgb24")
        pixels = rgb.to_ndarray()
        return np.rot90(pixels, round(frame.rotation / 90)) if frame.rotation else pixels

    def _time(self, thing: Any) -> float:
        """Of a frame or packet."""
        stamp = thing.pts if thing.pts is not None else thing.dts
        return (stamp or 0) * self._tick - self._start


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """FFmpeg's errors, in words."""
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
        raise InputError(reason, "the file is damaged, cut off, or no video") from error


def _is_cover(stream: Any) -> bool:
    """Cover art in a sound file counts as a video stream."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _after(frame: Any, video: Video) -> int:
    step = round(1 / video.fps / video._tick)
    return 0 if frame is None else int(frame.pts + max(1, step))


def _seconds(text: str) -> float | None:
    """`00:01:02.500000000` -> 62.5"""
    parts = text.split(":")
    try:
        return sum(float(p) * 60**i for i, p in enumerate(reversed(parts))) if text else None
    except ValueError:
        return None
