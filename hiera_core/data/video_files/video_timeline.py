"""Find out how many frames a video has and when each is shown: from its header, or, where headers
are often missing or wrong, from its packets, without decoding them."""

from __future__ import annotations

import contextlib
from array import array
from dataclasses import dataclass, field
from typing import Any, Self

import av
import numpy as np

from ...errors import InputError
from .listed_frames import INDEXED_FORMATS, ListedFrames

MAX_RATE = 1000  # frames per second; a higher declared rate is an error in the file
FALLBACK_RATE = 30.0
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
    constant_rate: bool = False  # so that a gap is a loss; the index of an MP4 file has no gaps
    in_order: bool = False  # time stamps are unusable: frame i is the i-th that is decoded
    present: int | None = None  # how many frames are in the file; None if they were not counted
    keys: tuple[int, ...] = ()  # time stamps of the key frames, in ticks, ascending
    declares_length: bool = True  # whether a truncated file would be noticed
    notes: tuple[str, ...] = ()


def read_timeline(container: Any, stream: Any) -> Timeline:
    """Return the timeline of a stream. The container is read to its end, unless its header lists
    all frames.

    Raises:
        InputError: The file has no frames, or has its frames decoded too often.
    """
    header = _Header.read(container, stream)
    header.listed.check_repeats(header.frames)
    if header.lists_all_frames:
        return Timeline(header.frames, header.rate, header.start)
    packets = _scan(container, stream, header)
    if header.listed.hidden and not header.listed.shown:
        raise InputError("its edit list shows no frame", "export the video again")
    if not packets.stamps:
        raise InputError("no frame can be decoded", "the file is damaged or truncated")
    listed = ListedFrames.read(container, stream)  # with all fragments
    jumps = packets.is_rearranged if header.has_edits else packets.is_reset
    in_order = header.format in NO_STAMP_FORMATS or jumps or not packets.ordered
    times = np.sort(np.asarray(packets.stamps)) * header.tick
    if not listed.shown:  # else each packet is a frame
        times = _distinct(times)
    if not header.has_edits and (in_order or len(times) < MIN_DISTINCT * len(packets.stamps)):
        in_order, fps = True, header.rate or _average_rate(times, 0.0)
        times = np.arange(len(packets.stamps)) / fps
    else:
        fps = _average_rate(times, header.rate)
    present = len(times)
    frames = _declared_frames(header, listed, packets, times, fps)
    if frames > present and _usual_rate_is(header.rate, times):
        fps = header.rate  # frames may be missing among the last ones, too
        frames = _declared_frames(header, listed, packets, times, fps)
    return Timeline(
        frames=frames,
        fps=fps,
        start=float(times[0]),
        constant_rate=header.constant_rate and fps == header.rate and not listed.shown,
        in_order=in_order,
        present=present,
        keys=tuple(sorted(set(packets.keys))),
        declares_length=header.seconds > 0,
        notes=(
            *_notes(header, listed, frames, float(times[0])),
            *_notes_of_start(packets.undecodable),
        ),
    )


def _declared_frames(
    header: _Header, listed: ListedFrames, packets: _Packets, times: np.ndarray, fps: float
) -> int:
    """Return the number of frames with those that are missing at the end of the file."""
    present, start = len(times), float(times[0])
    if listed.shown and header.frames:
        return max(present, listed.shown - packets.undecodable)
    end = max(float(times[-1]) + 1 / fps, packets.end * header.tick)
    lost = header.lost_seconds(end, start, packets.last_end)
    if lost > 0.5 / fps + 1e-3:
        present = max(present, round((times[-1] - times[0] + lost) * fps) + 1)
    return max(present, listed.shown)


def _notes(header: _Header, listed: ListedFrames, frames: int, start: float) -> tuple[str, ...]:
    if listed.shown > header.frames and not listed.hidden:
        return ()  # fragments, of which the header lists the first one, or none
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
    listed: ListedFrames = field(default_factory=ListedFrames)

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
            listed=ListedFrames.read(container, stream),
        )

    @property
    def lists_all_frames(self) -> bool:
        """Whether the number of frames can be taken from the header.

        An edit list may hide frames, or show them several times. The duration is usually another
        then.
        """
        if self.format not in INDEXED_FORMATS or not self.frames or not self.rate:
            return False
        listed = self.listed
        if listed.hidden or listed.shown != self.frames or not listed.in_file:
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
        length = max(end, end - start) if self.is_absolute else end - start
        return self.seconds - length

    @property
    def has_edits(self) -> bool:
        """Whether an edit list may choose among the frames."""
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
        is_fragmented = container.format.name in INDEXED_FORMATS and not stream.frames
        return seconds, False, is_fragmented or container.format.name == "asf"
    if tag := _parse_seconds(stream.metadata.get("DURATION", "")):
        return tag, False, True  # Matroska's tag is the time at which the last frame ends
    if container.duration:
        return container.duration / av.time_base, len(container.streams) > 1, True
    return 0.0, False, False


@dataclass
class _Packets:
    """The packets of a stream. Time stamps are in ticks."""

    reordered: bool  # whether frames may be decoded in another order than they are shown in
    shows_all: bool  # whether each packet is a frame, also if two have one time stamp
    stamps: array[int] = field(default_factory=lambda: array("q"))
    keys: list[int] = field(default_factory=list)  # time stamps of key frames
    ordered: bool = True  # whether all time stamps are there, and tell the order of the frames
    is_reset: bool = False  # whether the clock was
    end: int = 0  # when the last frame ends, in ticks; 0 if frames do not say how long they last
    last_end: float = 0.0  # seconds; of all streams of the file
    undecodable: int = 0  # frames at the start that depend on frames before it; not in `stamps`
    is_rearranged: bool = False  # whether an edit list has pieces begin before others end
    _last_dts: int | None = None

    def add(self, packet: Any) -> None:
        """Take the next packet whose frame is shown."""
        stamp = stamp_of(packet)
        if packet.is_keyframe and stamp is not None:
            self.keys.append(stamp)
        if stamp is None or (packet.pts is None and self.reordered):
            self.ordered = False
        if self.shows_all and self.stamps and stamp == self.stamps[-1]:
            self.ordered = False
        if packet.dts is not None:
            if self._last_dts is not None and packet.dts < self._last_dts:
                self.is_reset = True
            self._last_dts = packet.dts
        self.stamps.append(stamp or 0)


def _scan(container: Any, stream: Any, header: _Header) -> _Packets:
    """Read all packets of a file, without decoding them, but for the first ones of a cut."""
    codec = stream.codec_context
    reordered, shows_all = bool(codec.has_b_frames), codec.name in FRAME_PER_PACKET
    # AVI has no time stamps for presentation. FFmpeg invents them, in the order of decoding.
    found = _Packets(reordered, shows_all, ordered=not (reordered and header.format == "avi"))
    pieces, start = _Pieces(), _Start.for_file(stream, header)
    is_indexed, ends = header.format in INDEXED_FORMATS, dict[int, int]()
    with contextlib.suppress(av.FFmpegError):  # what follows a damaged part is not there
        for packet in container.demux():
            if not packet.size:
                continue
            index, stamp, is_shown = packet.stream.index, stamp_of(packet), not packet.is_discard
            if stamp is not None and is_shown:
                ends[index] = max(ends.get(index, 0), stamp + (packet.duration or 0))
            if index != stream.index:
                continue
            if header.has_edits:
                pieces.add(packet)
            if is_shown and not (is_indexed and packet.is_corrupt):  # that is cut off
                found.add(packet)
            if start is not None and not start.add(packet):
                found.undecodable = start.leave_out(found.stamps)
                start = None
    if start is not None:
        start.end()
        found.undecodable = start.leave_out(found.stamps)
    found.is_rearranged, found.end = pieces.overlap, ends.get(stream.index, 0)
    units = {index: container.streams[index].time_base or 0 for index in ends}
    found.last_end = max((float(end * units[index]) for index, end in ends.items()), default=0.0)
    return found


class _Pieces:
    """The pieces that an edit list joins. One may begin before the end of the piece before it, by
    less than the time of some frames. Frames are then decoded in another order than that of their
    time stamps."""

    def __init__(self) -> None:
        self.overlap = False
        self._latest: int | None = None  # time stamp of the frames so far
        self._latest_before: int | None = None  # of those before the last key frame

    def add(self, packet: Any) -> None:
        """Take the next packet, also one that is not shown. Each piece begins at a key frame."""
        if packet.is_keyframe:
            self._latest_before = self._latest
        stamp = stamp_of(packet)
        if stamp is None or packet.is_discard:
            return
        if self._latest_before is not None and stamp <= self._latest_before:
            self.overlap = True
        if self._latest is None or stamp > self._latest:
            self._latest = stamp


class _Start:
    """The first packets of a file that may be a piece of a stream: what a receiver records begins
    anywhere. Frames that depend on those before it are not shown, and are no damage.

    Only the decoder knows which these are. It is asked if the first packet is no key frame, if
    frames are shown before it, if an edit list hides frames, or if there are no time stamps. Frames
    before the first one that it shows are those with an earlier time stamp. Without time stamps,
    the decoder gets all frames up to a key frame, and those that it does not show are counted.

    Args:
        stream: The stream.
        header: What the file declares.
    """

    def __init__(self, stream: Any, header: _Header) -> None:
        self._stream = stream
        self._has_stamps = header.format not in NO_STAMP_FORMATS
        # Whether the decoder is needed in any case.
        self._is_certain = header.listed.hidden > 0 or not self._has_stamps
        self._first: Any = None  # the first packet, until it is clear that the decoder is needed
        self._count = self._shown = 0  # packets and frames
        self._listed = 0  # packets whose frames an edit list shows
        self._in_group: int | None = None  # of these, the ones before the next key frame
        self._first_shown: int | None = None  # time stamp of the first frame that is shown

    @classmethod
    def for_file(cls, stream: Any, header: _Header) -> Self | None:
        """Return a start, or None for a format whose files are complete."""
        is_piece = header.format in NO_LENGTH_FORMATS or header.listed.hidden > 0
        return cls(stream, header) if is_piece else None

    def add(self, packet: Any) -> bool:
        """Take a packet, and return whether the next one is needed."""
        if not self._has_stamps and (
            self._count == MAX_START or (self._shown and packet.is_keyframe)
        ):
            self._decode(None)  # frames of other groups do not depend on these
            return False
        if self._is_certain and self._count and packet.is_keyframe and self._in_group is None:
            self._in_group = self._listed
        self._count += 1
        self._listed += not packet.is_discard
        if self._count == 1 and packet.is_keyframe and not self._is_certain:
            self._first = packet
            return True
        if self._first is not None:
            stamps = packet.pts, self._first.pts
            if None not in stamps and stamps[0] > stamps[1]:
                return False
            self._decode(self._first)
            self._first = None
        self._decode(packet)
        return not self._has_stamps or (not self._shown and self._count < MAX_START)

    def end(self) -> None:
        """Take what the decoder holds back: as many frames as it has threads, or more."""
        if self._first is None:
            self._decode(None)

    def leave_out(self, stamps: array[int]) -> int:
        """Remove the stamps of frames that are not shown, and return how many these are."""
        count = len(stamps)
        if self._shown and not self._has_stamps:
            del stamps[: max(0, self._count - self._shown)]
            # A decoder may also show what it can make of a missing frame.
            stamps.extend(stamps[-1:] * (self._shown - self._count))
        elif self._first_shown is not None:
            group = stamps[: self._in_group]
            stamps[: len(group)] = array("q", [s for s in group if s >= self._first_shown])
        return max(0, count - len(stamps))

    def _decode(self, packet: Any) -> None:
        """Decode a packet; None for what is left."""
        with contextlib.suppress(av.FFmpegError):
            for frame in self._stream.codec_context.decode(packet):
                if not self._shown:
                    self._first_shown = frame.pts
                self._shown += 1


def stamp_of(item: Any) -> int | None:
    """Return the time stamp of a frame or packet in ticks, if it has one."""
    stamp: int | None = item.pts if item.pts is not None else item.dts
    return stamp


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
