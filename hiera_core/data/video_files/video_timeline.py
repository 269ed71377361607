"""Find out how many frames a video has and when each is shown: from its header, or, where headers
are often missing or wrong, from its packets, without decoding them."""

from __future__ import annotations

import contextlib
from array import array
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np

from ...errors import InputError

MAX_RATE = 1000  # frames per second; a higher declared rate is an error in the file
FALLBACK_RATE = 30.0
# Formats whose header lists every frame. FFmpeg reads this list when it opens a file.
INDEXED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2",)
# Formats without time stamps, or with too few. Their frames follow one another at a constant rate.
NO_STAMP_FORMATS = ("mpeg", "mpegvideo", "h264", "hevc", "m4v")
# Formats whose header does not declare a length. A truncated file looks like a shorter video.
NO_LENGTH_FORMATS = ("mpegts", "ogg", "dv", *NO_STAMP_FORMATS)
# Packets nearer than both of these belong to one frame.
SAME_FRAME = 0.25  # of the usual interval
SAME_FRAME_S = 0.01  # at a varying rate, frames can be much nearer than usual
# Codecs that show every packet as a frame of its own, also where two packets have one time stamp.
FRAME_PER_PACKET = ("theora",)
MAX_START = 1000  # packets; a key frame comes after fewer
MIN_DISTINCT = 0.4  # if fewer packets have distinct time stamps, these say nothing


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video are shown. Times are in seconds from the first frame."""

    frames: int  # that the video has, or had before it was cut off
    fps: float  # average rate
    start: float  # time stamp of the first frame, in seconds
    constant_rate: bool
    in_order: bool = False  # time stamps are unusable: frame i is the i-th that is decoded
    present: int | None = None  # how many frames are in the file; None if they were not counted
    keys: tuple[int, ...] = ()  # time stamps of the key frames, in ticks, ascending
    declares_length: bool = True  # whether a truncated file would be noticed
    notes: tuple[str, ...] = ()


def read_timeline(container: Any, stream: Any) -> Timeline:
    """Return the timeline of a stream. The container is read to its end, unless its header lists
    all frames.

    Raises:
        InputError: The file has no frames.
    """
    header = _Header.read(container, stream)
    if header.lists_all_frames:
        return Timeline(header.frames, header.rate, header.start, header.constant_rate)
    packets = _scan(container, stream)
    if not packets.stamps:
        raise InputError("no frame can be decoded", "the file is damaged or truncated")
    in_order = header.format in NO_STAMP_FORMATS or not packets.ordered
    times = np.sort(np.asarray(packets.stamps)) * header.tick
    if not header.has_edits:  # of two pieces, the end and the start may be as near
        times = _distinct(times)
    if in_order or len(times) < MIN_DISTINCT * len(packets.stamps):
        in_order, fps = True, header.rate or FALLBACK_RATE
        times = np.arange(len(packets.stamps)) / fps
    else:
        fps = _average_rate(times, header.rate)
    end = float(times[-1]) + 1 / fps
    lost = header.lost_seconds(end, float(times[0]), packets.last_end)
    present = frames = len(times)
    # An edit may begin or end within the time of a frame.
    if lost > (1.0 if header.has_edits else 0.5) / fps + 1e-3:
        if _usual_rate_is(header.rate, times):
            fps = header.rate  # frames may be missing among the last ones, too
        frames = max(present, round((times[-1] - times[0] + lost) * fps) + 1)
    return Timeline(
        frames=frames,
        fps=fps,
        start=float(times[0]),
        constant_rate=header.constant_rate and fps == header.rate,
        in_order=in_order,
        present=present,
        keys=tuple(sorted(set(packets.keys))),
        declares_length=header.seconds > 0,
        notes=_notes(header, frames, float(times[0])) + _notes_of_start(packets.undecodable),
    )


def _notes(header: _Header, frames: int, start: float) -> tuple[str, ...]:
    seconds = header.seconds - (start if header.is_absolute else 0.0)
    declared = header.frames or round(seconds * header.rate)
    if not declared or abs(declared - frames) <= 1 or header.is_shared:
        return ()
    if header.has_edits and frames < declared:
        return (f"its edit list hides {declared - frames} of {declared} frames",)
    return (f"the header declares {declared} frames, and the file has {frames}",)


def _notes_of_start(undecodable: int) -> tuple[str, ...]:
    if not undecodable:
        return ()
    return (f"begins within a group of frames: {undecodable} of them cannot be decoded",)


@dataclass(frozen=True)
class _Header:
    """What a file declares. Numbers that it does not declare are 0."""

    format: str
    tick: float  # unit of time stamps, in seconds
    start: float
    rate: float
    constant_rate: bool
    frames: int
    seconds: float
    is_shared: bool = False  # `seconds` is that of the container, which may be that of the sound
    is_absolute: bool = False  # `seconds` counts from time stamp 0, not from the first frame

    @classmethod
    def read(cls, container: Any, stream: Any) -> _Header:
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        rate = rate if 0 < rate < MAX_RATE else 0.0
        tick = float(stream.time_base or 1 / 90_000)
        base = float(stream.base_rate or 0)
        seconds, is_shared, is_absolute = _declared_seconds(container, stream, tick)
        return cls(
            format=container.format.name,
            tick=tick,
            start=(stream.start_time or 0) * tick,
            rate=rate,
            constant_rate=bool(rate) and abs(base / rate - 1) < 1e-3,
            frames=stream.frames,
            seconds=seconds,
            is_shared=is_shared,
            is_absolute=is_absolute,
        )

    @property
    def lists_all_frames(self) -> bool:
        """Whether the number of frames can be taken from the header.

        An edit list may hide some of the frames, or only one. The duration is then shorter.
        """
        if self.format not in INDEXED_FORMATS or not self.frames or not self.rate:
            return False
        return abs(self.seconds * self.rate - self.frames) < 0.5

    def lost_seconds(self, end: float, start: float, last_end: float) -> float:
        """Return how much is missing at the end of the file.

        Args:
            end, start: When the first frame begins and the last one ends.
            last_end: When the last stream of the file ends.
        """
        if self.is_shared and last_end > self.seconds - 1.0:
            return 0.0  # another stream is longer than the video
        pause = max(self.start, start, 0.0) if self.has_edits else 0.0
        return self.seconds - end if self.is_absolute else self.seconds - pause - (end - start)

    @property
    def has_edits(self) -> bool:
        """Whether an edit list chooses among the frames. Its length then includes a pause before
        the first one."""
        return self.format in INDEXED_FORMATS and self.frames > 0 and not self.lists_all_frames


def _declared_seconds(container: Any, stream: Any, tick: float) -> tuple[float, bool, bool]:
    """Return the declared length and whether it is shared and absolute; see `_Header`."""
    if container.format.name in NO_LENGTH_FORMATS:
        return 0.0, False, False
    if stream.duration:
        seconds = float(stream.duration * tick)
        rate = float(stream.average_rate or 0)
        if container.format.name not in INDEXED_FORMATS and rate:
            seconds = max(seconds, stream.frames / rate)  # FFmpeg shortens that of a cut-off AVI
        return seconds, False, False
    if tag := _parse_seconds(stream.metadata.get("DURATION", "")):
        return tag, False, True  # Matroska's tag is the time at which the last frame ends
    if container.duration:
        return container.duration / av.time_base, len(container.streams) > 1, True
    return 0.0, False, False


@dataclass
class _Packets:
    """The packets of a stream. Time stamps are in ticks."""

    stamps: array[int] = field(default_factory=lambda: array("q"))
    keys: list[int] = field(default_factory=list)  # time stamps of key frames
    ordered: bool = True  # whether all time stamps are there, and tell the order of the frames
    last_end: float = 0.0  # seconds; of all streams of the file
    undecodable: int = 0  # frames at the start that depend on frames before it; not in `stamps`


def _scan(container: Any, stream: Any) -> _Packets:
    """Read all packets of a file, without decoding them."""
    found = _Packets()
    reordered = stream.codec_context.has_b_frames
    # AVI has no time stamps for presentation. FFmpeg invents them, in the order of decoding.
    found.ordered = not (reordered and container.format.name == "avi")
    shows_all = stream.codec_context.name in FRAME_PER_PACKET
    last_dts = last_stamp = None
    start = _Start(stream) if container.format.name in NO_LENGTH_FORMATS else None
    with contextlib.suppress(av.FFmpegError):  # what follows a damaged part is not there
        for packet in container.demux():
            if not packet.size or packet.is_discard:
                continue
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is not None and packet.time_base:
                end = float((stamp + (packet.duration or 0)) * packet.time_base)
                found.last_end = max(found.last_end, end)
            if packet.stream.index != stream.index:
                continue
            found.stamps.append(stamp or 0)
            if start is not None and not start.add(packet):
                found.undecodable = start.leave_out(found.stamps)
                start = None
            if packet.is_keyframe and stamp is not None:
                found.keys.append(stamp)
            if stamp is None or (packet.pts is None and reordered):
                found.ordered = False
            if shows_all and stamp == last_stamp:
                found.ordered = False
            last_stamp = stamp
            if packet.dts is not None:
                if last_dts is not None and packet.dts < last_dts:
                    found.ordered = False  # the clock was reset
                last_dts = packet.dts
    if start is not None:
        start.end()
        found.undecodable = start.leave_out(found.stamps)
    return found


class _Start:
    """The first packets of a file that may be a piece of a stream: what a receiver records begins
    anywhere. Frames that depend on those before it are not shown, and are no damage.

    Only the decoder knows which these are. It is asked if the first packet is no key frame, or if
    frames are shown before it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._first: Any = None  # the first packet, until it is clear that the decoder is needed
        self._count = 0
        self._shown: int | None = None  # time stamp of the first frame that is shown

    def add(self, packet: Any) -> bool:
        """Take a packet, and return whether the next one is needed."""
        self._count += 1
        if self._count == 1 and packet.is_keyframe:
            self._first = packet
            return True
        if self._first is not None:
            stamps = packet.pts, self._first.pts
            if None not in stamps and stamps[0] > stamps[1]:
                return False
            self._decode(self._first)
            self._first = None
        self._decode(packet)
        return self._shown is None and self._count < MAX_START

    def end(self) -> None:
        """Take what the decoder holds back: as many frames as it has threads, or more."""
        if self._first is None:
            self._decode(None)

    def leave_out(self, stamps: array[int]) -> int:
        """Remove the stamps of frames that are not shown, and return how many these are."""
        if self._shown is None:
            return 0
        kept = [stamp for stamp in stamps if stamp >= self._shown]
        count = len(stamps) - len(kept)
        stamps[:] = array("q", kept)
        return count

    def _decode(self, packet: Any) -> None:
        """Decode a packet; None for what is left."""
        with contextlib.suppress(av.FFmpegError):
            for frame in self._stream.codec_context.decode(packet):
                if self._shown is None:
                    self._shown = frame.pts


def _distinct(times: np.ndarray) -> np.ndarray:
    """Return the times of frames, from those of packets: two fields, or a hidden frame and the one
    that shows it, may have packets of their own."""
    gaps = np.diff(times)
    if not (gaps > 0).any():
        return times
    usual = float(np.median(gaps[gaps > 0]))
    return times[np.concatenate(([True], gaps > min(SAME_FRAME * usual, SAME_FRAME_S)))]


def _average_rate(times: np.ndarray, declared: float) -> float:
    """Return the declared rate if the frames follow it, else their average rate, as if the last
    frame lasted the usual time."""
    intervals, span = len(times) - 1, float(times[-1] - times[0])
    if declared and abs(declared * span - intervals) < 0.5:
        return declared
    if span <= 0:
        return declared or FALLBACK_RATE
    rate = len(times) / (span + float(np.median(np.diff(times))))
    return rate if rate < MAX_RATE else declared or FALLBACK_RATE


def _usual_rate_is(rate: float, times: np.ndarray) -> bool:
    return rate > 0 and len(times) > 1 and abs(np.median(np.diff(times)) * rate - 1) < 0.1


def _parse_seconds(text: str) -> float | None:
    """`00:01:02.500000000` -> 62.5; None if there is no such text."""
    parts = text.split(":")
    try:
        return sum(float(p) * 60**i for i, p in enumerate(reversed(parts))) if text else None
    except ValueError:
        return None
