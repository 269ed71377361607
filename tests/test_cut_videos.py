"""Videos that were cut without encoding them again: their frames are those of sequential decoding,
and what a cut hides, or makes undecodable, is no damage."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiera_core.data.video_files.video_reader import Video
from hiera_core.errors import InputError

from .test_video_reader import all_frames, picture, write_video
from .test_video_timeline import CONTAINERS, RATE, SIZE

FRAMES = 150
UNEVEN = [n // 3 * 0.25 + (0.0, 0.02, 0.12)[n % 3] for n in range(60)]  # seconds
Edit = tuple[int, int]  # duration in ticks of the movie (1/1000 s), and time stamp in the media


def check_frames(path: Path, seconds: float | None = None, notes: int | None = None) -> None:
    """Check that each frame is what a viewer sees at its time, in any order of reading; or, if
    pieces overlap, the one that decoding from the start gives in its place."""
    with av.open(str(path)) as container:
        shown = [f for f in container.decode(video=0) if f.pts is not None]
        times = np.array([float(f.pts * f.time_base) for f in shown])  # type: ignore[operator]
        pixels = [f.to_ndarray(format="rgb24") for f in shown]
    if not shown:
        with pytest.raises(InputError, match="its edit list shows no frame"):
            Video(path)
        return
    is_in_order = (np.diff(times) <= 0).any()
    with Video(path) as video:
        assert video.frames == len(shown)
        if seconds is not None:
            assert video.duration == pytest.approx(seconds, abs=0.1)
        if notes is not None:
            assert len(video.notes) == notes
        for order in (range(video.frames), range(video.frames - 1, 0, -7)):
            for frame in video.read(list(order)):
                moment = times[0] + (frame.index + 0.25) / video.fps + 1e-6
                at_moment = np.searchsorted(times, moment, side="right") - 1
                expected = pixels[frame.index if is_in_order else at_moment]
                assert frame.intact, frame.index
                assert np.array_equal(frame.pixels, expected), frame.index


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video of five seconds with a single key frame."""
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", FRAMES, gop=250, size=SIZE)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same video with a key frame every second."""
    return write_video(tmp_path_factory.mktemp("groups") / "x.mp4", FRAMES, gop=30, size=SIZE)


@pytest.fixture(scope="module")
def intra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same video of key frames only."""
    return write_video(tmp_path_factory.mktemp("intra") / "x.mp4", FRAMES, gop=1, size=SIZE)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video of five seconds and a varying rate."""
    folder = tmp_path_factory.mktemp("uneven")
    return write_video(folder / "x.mp4", len(UNEVEN), gop=12, size=SIZE, times=UNEVEN)


@pytest.mark.parametrize(
    ("hidden", "ending"),
    [(1, "mp4"), (1, "mov"), (2, "3gp"), (17, "m4v"), (147, "mov"), (149, "mp4")],
)
def test_any_number_of_hidden_frames(hidden: int, ending: str, long: Path, tmp_path: Path) -> None:
    """One frame of a hundred is within what rounding could explain, and is hidden all the same."""
    path = tmp_path / f"cut.{ending}"
    with av.open(str(long)) as source, av.open(str(path), "w") as cut:
        stream = source.streams.video[0]
        copy: Any = cut.add_stream_from_template(stream)
        assert stream.time_base is not None
        offset = round(hidden / 30 / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
                packet.stream = copy
                cut.mux(packet)
    assert len(all_frames(path)) == FRAMES - hidden
    check_frames(path, (FRAMES - hidden) / 30, notes=int(hidden > 1))


def rewrite_edits(path: Path, edits: list[Edit], version: int) -> None:
    """Replace the edit list of an MP4 file whose header is at its end.

    Args:
        path: The file.
        edits: Its new edits.
        version: Of the boxes `elst` and `mvhd`; version 1 has numbers of 64 bits.
    """
    content = path.read_bytes()
    assert content.index(b"moov") > content.index(b"mdat")

    def boxes(start: int, end: int) -> Iterator[bytes]:
        while start < end:
            size, kind = struct.unpack(">I4s", content[start : start + 8])
            yield box(kind, start, size)
            start += size

    def box(kind: bytes, start: int, size: int) -> bytes:
        body = content[start + 8 : start + size]
        if kind in (b"moov", b"trak", b"edts"):
            body = b"".join(boxes(start + 8, start + size))
        elif kind == b"elst":
            form = ">QqHH" if version else ">IiHH"
            body = struct.pack(">B3xI", version, len(edits))
            body += b"".join(struct.pack(form, *edit, 1, 0) for edit in edits)
        elif kind == b"mvhd" and version:
            numbers = struct.unpack(">IIII", body[4:20])
            body = b"\1\0\0\0" + struct.pack(">QQIQ", *numbers) + body[20:]
        return struct.pack(">I4s", 8 + len(body), kind) + body

    path.write_bytes(b"".join(boxes(0, len(content))))


def edit(source: Path, path: Path, edits: list[tuple[int, float | None]], version: int = 0) -> Path:
    """Copy a video with other edits: milliseconds, and where they begin in seconds (None: a
    pause)."""
    content = source.read_bytes()
    path.write_bytes(content)
    with av.open(str(source)) as container:
        tick = container.streams.video[0].time_base
    assert tick is not None
    at = content.index(b"elst") + 16
    (first,) = struct.unpack(">i", content[at : at + 4])  # where the pictures begin
    whole = [(d, -1 if t is None else first + round(t / tick)) for d, t in edits]
    rewrite_edits(path, whole, version)
    return path


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize(
    ("edits", "seconds"),
    [
        ([(3000, 2.0)], 3.0),
        ([(3000, 0.0)], 3.0),  # the end is hidden
        ([(2000, 1.5)], 2.0),
        ([(1000, None), (5000, 0.0)], 5.0),  # it begins a second after the sound
        ([(1000, 0.0), (2000, 2.5)], 3.0),  # something is cut out in the middle
        ([(1000, 3.0), (1000, 1.0)], 2.0),  # two pieces in another order
        ([(2000, 0.0), (2000, 0.0)], 4.0),  # a piece that is shown twice
    ],
    ids=["start", "end", "both", "delay", "middle", "order", "twice"],
)
def test_edit_lists_of_any_form(
    edits: list[tuple[int, float | None]], seconds: float, version: int, long: Path, tmp_path: Path
) -> None:
    path = edit(long, tmp_path / "edited.mp4", edits, version)
    check_frames(path, seconds, notes=int(seconds < 5))


@pytest.mark.parametrize(
    ("edits", "frames"),
    [
        ([(5000, 0.7)], 129),  # it is said to last longer than it does
        ([(2021, 0.0), (3000, 1.0)], 151),  # a frame more than the file holds
        ([(2500, 2.5), (2500, 0.0)], 150),
        ([(2500, 1.0), (2500, 1.0)], 150),
    ],
    ids=["start", "jump back", "swapped", "twice"],
)
@pytest.mark.parametrize("source", ["long", "groups", "intra"])
def test_edit_lists_as_long_as_the_file(
    edits: list[tuple[int, float | None]],
    frames: int,
    source: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """The duration of such a list is that of all frames, which are not those that it shows."""
    path = edit(request.getfixturevalue(source), tmp_path / "edited.mp4", edits)
    assert len(all_frames(path)) == frames
    check_frames(path)


SOURCES = ("long", "groups", "intra", "uneven")
LISTS = st.lists(
    st.one_of(
        st.tuples(st.integers(100, 3000), st.integers(0, 4800).map(lambda start: start / 1000)),
        st.tuples(st.integers(100, 1000), st.none()),  # a pause
    ),
    min_size=1,
    max_size=4,
).filter(lambda pieces: any(start is not None for _, start in pieces))


@pytest.fixture(scope="module")
def sources(request: pytest.FixtureRequest) -> dict[str, Path]:
    """Return videos to edit by name."""
    return {name: request.getfixturevalue(name) for name in SOURCES}


@given(LISTS, st.sampled_from((0, 1)), st.sampled_from(SOURCES))
@settings(deadline=None, max_examples=12, derandomize=True)
def test_random_edit_lists(
    sources: dict[str, Path], edits: list[tuple[int, float | None]], version: int, name: str
) -> None:
    """Any pieces, in any order, may overlap, and may end after the file does."""
    source = sources[name]
    check_frames(edit(source, source.with_name("random.mp4"), edits, version))


@pytest.mark.slow
@given(LISTS, st.sampled_from((0, 1)), st.sampled_from(SOURCES))
@settings(deadline=None, max_examples=1000)
def test_many_random_edit_lists(
    sources: dict[str, Path], edits: list[tuple[int, float | None]], version: int, name: str
) -> None:
    """Do the same with a thousand lists."""
    source = sources[name]
    check_frames(edit(source, source.with_name("random.mp4"), edits, version))


@pytest.mark.parametrize("shown", [1, 2, 4])
def test_a_piece_of_a_stream_may_end_soon(shown: int, tmp_path: Path) -> None:
    """The decoder holds frames back, and gives the first one only at the end of the file."""
    format, codec, _, options = CONTAINERS["h.264 in a transport stream"]
    path = tmp_path / "x.ts"
    with av.open(str(path), "w", format=format) as writer:
        stream: Any = writer.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 25
        for i in range(50 + shown):
            frame = av.VideoFrame.from_ndarray(picture(i / RATE, *SIZE), format="rgb24")
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode(None))
    whole = path.read_bytes()
    path.write_bytes(whole[int(len(whole) * 0.7) // 188 * 188 :])
    expected = all_frames(path)
    with Video(path) as video:
        assert len(video.notes) == 1 and video.frames == len(expected) == shown
        for read in video.read(range(shown)):
            assert read.intact and np.array_equal(read.pixels, expected[read.index])


@pytest.mark.parametrize("size", [188, 192])
@pytest.mark.parametrize("name", ["h264", "h264 open", "mpeg2 open"])
def test_a_piece_of_a_stream_begins_anywhere(name: str, size: int, tmp_path: Path) -> None:
    """A receiver starts to record between two key frames, and within a packet."""
    container = "open groups in a transport stream"
    if name.startswith("h264"):
        container = f"{'open h.264 groups' if 'open' in name else 'h.264 in a transport stream'}"
    format, codec, _, options = CONTAINERS[container]
    path = tmp_path / "x.ts"
    mode = {"mpegts_m2ts_mode": str(int(size == 192)), "output_ts_offset": "5000"}
    with av.open(str(path), "w", format=format, options=mode) as writer:
        stream: Any = writer.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 25
        for i in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(i / RATE, *SIZE), format="rgb24")
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode(None))
    whole, noted = path.read_bytes(), 0
    for part in (0.2, 0.35, 0.5, 0.65):
        start = int(len(whole) * part) // size * size
        for begin in (start, start + 57):
            path.write_bytes(whole[begin:])
            expected = all_frames(path)
            with Video(path) as video:
                noted += len(video.notes)
                assert video.frames == len(expected), (part, begin)
                for order in (range(0, video.frames, 3), range(video.frames - 1, 0, -7)):
                    for shown in video.read(list(order)):
                        assert shown.intact, (part, shown.index)
                        assert np.array_equal(shown.pixels, expected[shown.index])
    assert noted >= 4, "frames that cannot be decoded are mentioned"


@pytest.mark.parametrize(
    "name",
    [
        "mpeg-2 programme stream",
        "mpeg-1 programme stream",
        "dvd",
        "raw mpeg-2",
        "raw h.264",
        "open raw",
    ],
)
def test_a_piece_without_time_stamps_begins_anywhere(name: str, tmp_path: Path) -> None:
    """In a programme stream, time stamps are guessed until the first one, and then begin anew."""
    open_groups = {"bf": "3", "x264-params": "open-gop=1"}
    container = ("h264", "libx264", {}, open_groups) if name == "open raw" else CONTAINERS[name]
    format, codec, _, options = container
    path = tmp_path / "x"
    with av.open(str(path), "w", format=format) as writer:
        stream: Any = writer.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 25
        for i in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(i / RATE, *SIZE), format="rgb24")
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode(None))
    whole = path.read_bytes()
    group = whole.find(b"\0\0\1\xb3", len(whole) // 3)  # begins with a key frame
    starts = [14482, 18432, 18316, *range(2048, len(whole) * 3 // 4, len(whole) // 7)]
    for start in [*starts, group] if group > 0 else starts:
        path.write_bytes(whole[start:])
        expected = all_frames(path)
        with Video(path) as video:
            assert video.frames == len(expected), start
            for shown in video.read(range(0, video.frames, 3)):
                assert shown.intact, (start, shown.index)
                assert np.array_equal(shown.pixels, expected[shown.index]), (start, shown.index)
