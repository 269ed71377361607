"""Tests of containers: whatever a header says, the frames are those of decoding from the start, and
their number is what is there."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from hiera_core.data.video_files.video_reader import Video
from hiera_core.errors import InputError

from .test_video_reader import all_frames, picture, write_video

FRAMES, RATE, SIZE = 100, 25, (96, 64)
# name -> container, codec, options of the container, options of the codec
CONTAINERS: dict[str, tuple[str, str, dict[str, str], dict[str, str]]] = {
    "mpeg-2 programme stream": ("mpeg", "mpeg2video", {}, {"bf": "2"}),
    "mpeg-1 programme stream": ("mpeg", "mpeg1video", {}, {"bf": "2"}),
    "dvd": ("vob", "mpeg2video", {}, {"bf": "2", "flags": "-cgop"}),
    "open groups in a transport stream": ("mpegts", "mpeg2video", {}, {"bf": "2"}),
    "h.264 in a transport stream": ("mpegts", "libx264", {}, {"bf": "3"}),
    "open h.264 groups": ("mpegts", "libx264", {}, {"bf": "3", "x264-params": "open-gop=1"}),
    "intra refresh": ("mp4", "libx264", {}, {"x264-params": "intra-refresh=1"}),
    "intra refresh in matroska": ("matroska", "libx264", {}, {"x264-params": "intra-refresh=1"}),
    "open h.264 groups in mp4": ("mp4", "libx264", {}, {"bf": "3", "x264-params": "open-gop=1"}),
    "fragmented mp4": ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}, {}),
    "live mp4": ("mp4", "libx264", {"movflags": "frag_every_frame+empty_moov"}, {}),
    "quicktime": ("mov", "mpeg4", {}, {"bf": "2"}),
    "matroska": ("matroska", "libx264", {}, {"bf": "3"}),
    "live matroska": ("matroska", "mpeg4", {"live": "1"}, {}),
    "live webm": ("webm", "libvpx", {"live": "1"}, {"auto-alt-ref": "1", "lag-in-frames": "10"}),
    "webm": ("webm", "libvpx-vp9", {}, {"auto-alt-ref": "1", "lag-in-frames": "10"}),
    "flash": ("flv", "flv1", {}, {}),
    "h.264 in flash": ("flv", "libx264", {}, {"bf": "3"}),
    "flash without a length": ("flv", "flv1", {"flvflags": "no_duration_filesize"}, {}),
    "windows media": ("asf", "wmv2", {}, {}),
    "old windows media": ("asf", "msmpeg4", {}, {}),
    "avi": ("avi", "mpeg4", {}, {}),
    "avi with b-frames": ("avi", "mpeg4", {}, {"bf": "2"}),
    "avi of jpegs": ("avi", "mjpeg", {}, {}),
    "h.264 in avi": ("avi", "libx264", {}, {"bf": "3"}),
    "ogg": ("ogg", "libtheora", {}, {}),
    "raw h.264": ("h264", "libx264", {}, {"bf": "3"}),
    "raw hevc": ("hevc", "libx265", {}, {"x265-params": "log-level=none"}),
    "raw mpeg-2": ("mpeg2video", "mpeg2video", {}, {"bf": "2"}),
    "raw mpeg-4": ("m4v", "mpeg4", {}, {"bf": "2"}),
    "ivf": ("ivf", "libvpx", {}, {"auto-alt-ref": "1", "lag-in-frames": "10"}),
    "nut": ("nut", "mpeg4", {}, {"bf": "2"}),
    "mxf": ("mxf", "mpeg2video", {}, {"bf": "2"}),
}


def write(path: Path, name: str, frames: int = FRAMES) -> Path:
    """Write a moving photograph in one of the containers."""
    format, codec, options, codec_options = CONTAINERS[name]
    try:
        with av.open(str(path), "w", format=format, options=options) as container:
            stream: Any = container.add_stream(codec, rate=RATE, options=codec_options)
            stream.width, stream.height = SIZE
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.codec_context.gop_size = 12
            for i in range(frames):
                frame = av.VideoFrame.from_ndarray(picture(i / RATE, *SIZE), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except (av.FFmpegError, ValueError) as error:
        pytest.skip(f"this FFmpeg cannot write it: {error}")
    return path


@pytest.mark.parametrize("name", CONTAINERS)
def test_frames_are_those_of_sequential_decoding(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "x", name)
    frames = all_frames(path)
    orders = {
        "ascending": list(range(0, FRAMES, 7)),
        "reversed": list(range(FRAMES - 1, 0, -9)),
        "random": np.random.default_rng(0).integers(0, FRAMES, 20).tolist(),
        "sparse": [2, 60, 97],
        "one": [71],
    }
    for order, indices in orders.items():
        with Video(path) as video:
            assert (video.frames, video.notes) == (len(frames), ())
            assert video.fps == pytest.approx(RATE, rel=0.01)
            for frame in video.read([i for i in indices if i < len(frames)]):
                assert frame.intact, (order, frame.index)
                assert np.array_equal(frame.pixels, frames[frame.index]), (order, frame.index)


@pytest.mark.parametrize(
    "name", ["open groups in a transport stream", "h.264 in a transport stream", "dvd", "raw h.264"]
)
def test_a_clock_that_is_reset_does_not_confuse_frames(tmp_path: Path, name: str) -> None:
    """Two recordings in one file, as receivers and camcorders write them."""
    first, second = (write(tmp_path / n, name, frames) for n, frames in [("a", 60), ("b", 40)])
    path = tmp_path / "both"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    frames = all_frames(path)
    with Video(path) as video:
        assert abs(video.frames - len(frames)) <= 2
        indices = [0, 5, 58, 63, 80, len(frames) - 1, 31, 7]
        for frame in video.read(indices):
            assert np.array_equal(frame.pixels, frames[frame.index]), frame.index


def set_number(content: bytes, name: bytes, value: float) -> bytes:
    """Change a number in the metadata of a Flash video."""
    start = content.index(name) + len(name) + 1
    return content[:start] + struct.pack(">d", value) + content[start + 8 :]


def slide_show(path: Path, codec: str) -> Path:
    """Write four pictures, a second apart."""
    return write_video(path, frames=4, fps=25, times=[0.0, 1.0, 2.0, 3.0], codec=codec)


def test_a_wrong_rate_does_not_multiply_frames(tmp_path: Path) -> None:
    path = slide_show(tmp_path / "x.flv", "flv1")
    path.write_bytes(set_number(path.read_bytes(), b"framerate", 30))
    frames = all_frames(path)
    with Video(path) as video:
        assert (video.frames, video.fps) == (4, 1.0)
        assert video.notes and video.notes[0].endswith("frames, and the file has 4")
        for frame in video.read([0, 1, 2, 3]):
            assert frame.intact and np.array_equal(frame.pixels, frames[frame.index])


def test_a_varying_rate_does_not_lose_frames(tmp_path: Path) -> None:
    times = [0.0, 0.05, 0.1, 0.12, 0.14, 0.4, 0.45, 0.5, 0.55, 0.6, 0.8, 0.85, 0.9, 0.95, 1.0]
    path = write_video(tmp_path / "x.wmv", frames=15, fps=13, times=times, codec="wmv2")
    frames = all_frames(path)
    with Video(path) as video:
        assert video.frames == len(frames) == 15
        for frame in video.read(range(15)):
            moment = frame.index / video.fps + 0.25 / video.fps + 1e-3
            expected = max(i for i, time in enumerate(times) if time <= moment)
            assert np.array_equal(frame.pixels, frames[expected]), frame.index


def test_a_wrong_number_of_frames_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.avi", "avi")
    content = path.read_bytes()
    start = content.index(b"strh") + 8 + 32  # dwLength of the stream
    path.write_bytes(content[:start] + struct.pack("<I", 40) + content[start + 4 :])
    with Video(path) as video:
        assert video.frames == FRAMES
        assert video.notes == ("the header declares 40 frames, and the file has 100",)


def test_more_declared_than_present_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.flv", "flash")
    path.write_bytes(set_number(path.read_bytes(), b"duration", 8.0))
    with Video(path) as video:
        assert video.frames == 200
        with pytest.raises(InputError, match="100 of 200 frames are damaged or lost"):
            next(video.read([0]))


@pytest.mark.parametrize("name", ["matroska", "flash", "windows media", "avi", "h.264 in flash"])
def test_truncation_is_never_silent(tmp_path: Path, name: str) -> None:
    """A file that was cut off gives an error, damaged frames, or the frames of the whole file."""
    path = write(tmp_path / "x", name)
    whole, frames = path.read_bytes(), all_frames(path)
    errors = 0
    for part in range(4, 64, 3):
        path.write_bytes(whole[: len(whole) * part // 64])
        try:
            with Video(path) as video:
                shown = list(video.read(range(0, video.frames, 9)))
        except InputError:
            errors += 1
            continue
        if not video.declares_length:  # FFmpeg does not tell the length of a cut-off ASF file
            continue
        assert video.frames == FRAMES or any(not frame.intact for frame in shown), part
        for frame in shown:
            assert not frame.intact or np.array_equal(frame.pixels, frames[frame.index])
    assert errors >= 16 or name == "windows media"


def test_a_key_frame_that_is_none_is_not_used(tmp_path: Path) -> None:
    """All frames of this file are marked as key frames."""
    path = write(tmp_path / "x.avi", "avi")
    content = bytearray(path.read_bytes())
    start = content.index(b"idx1") + 8
    for entry in range(start, len(content) - 15, 16):
        content[entry + 4] |= 0x10
    path.write_bytes(content)
    frames = all_frames(path)
    with Video(path) as video:
        for frame in video.read([5, 47, 95, 30]):
            assert np.array_equal(frame.pixels, frames[frame.index]), frame.index


@pytest.mark.parametrize("format", ["mp4", "matroska"])
def test_time_stamps_that_contradict_the_order_are_not_used(tmp_path: Path, format: str) -> None:
    """Some programs write the time of decoding as the time at which a frame is shown."""
    source = write(tmp_path / "x", "matroska")
    path = tmp_path / "y"
    with av.open(str(source)) as reader, av.open(str(path), "w", format=format) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(reader.demux(video=0)):
            if packet.size:
                packet.pts = packet.dts = number * 40
                packet.stream = stream
                writer.mux(packet)
    frames = all_frames(path)
    for indices in ([0, 5, 6, 47, 95], [71, 30], [50]):
        with Video(path) as video:
            assert video.frames == len(frames) == FRAMES
            for frame in video.read(indices):
                assert frame.intact
                assert np.array_equal(frame.pixels, frames[frame.index]), (indices, frame.index)


def test_frames_that_depend_on_a_damaged_one_are_damaged(tmp_path: Path) -> None:
    """What they look like depends on how many threads FFmpeg decodes with."""
    path = write(tmp_path / "x", "fragmented mp4")  # a key frame at 0, 12, 24, ...
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        start, size = packets[26].pos, packets[26].size
    content = bytearray(path.read_bytes())
    content[start + 8 : start + size] = bytes(size - 8)
    path.write_bytes(content)
    with Video(path) as video:
        intact = [frame.intact for frame in video.read(range(FRAMES))]
    first = intact.index(False)
    assert 24 < first < 30 and not any(intact[first:36])
    assert all(intact[:24]) and all(intact[36:])


def check_frames(path: Path, expected: list[np.ndarray]) -> None:
    """Check the number of frames, and the frames in ascending and in falling order."""
    with Video(path) as video:
        assert video.frames == len(expected)
        assert video.duration == pytest.approx(len(expected) / RATE, rel=0.02)
        for order in (range(0, len(expected), 3), range(len(expected) - 1, 0, -7)):
            for frame in video.read(list(order)):
                assert frame.intact, frame.index
                assert np.array_equal(frame.pixels, expected[frame.index]), frame.index


@pytest.mark.parametrize("size", [188, 192])
@pytest.mark.parametrize(
    "name", ["h.264 in a transport stream", "open groups in a transport stream"]
)
def test_a_piece_of_a_broadcast_begins_far_from_zero(name: str, size: int, tmp_path: Path) -> None:
    """Receivers write `.ts`, with packets of 188 bytes, and camcorders `.mts`, with 192 bytes. A
    piece that begins at a key frame is complete."""
    options = {"mpegts_m2ts_mode": str(int(size == 192)), "output_ts_offset": "5000"}
    _, codec, _, codec_options = CONTAINERS[name]
    pieces = []
    for offset in (0, 40):  # a recording, and the one after it
        path = tmp_path / f"{offset}.mts"
        with av.open(str(path), "w", format="mpegts", options=options) as container:
            stream: Any = container.add_stream(codec, rate=RATE, options=codec_options)
            stream.width, stream.height = SIZE
            stream.pix_fmt = "yuv420p"
            for i in range(offset, offset + 40):
                frame = av.VideoFrame.from_ndarray(picture(i / RATE, *SIZE), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        pieces.append(path)
    with av.open(str(pieces[0])) as container:
        start = container.start_time
        assert start is not None and start > 4000 * 1_000_000
    for piece in pieces:
        assert len(piece.read_bytes()) % size == 0
        check_frames(piece, all_frames(piece))


@pytest.mark.parametrize("rotation", [0, 90, 180])
@pytest.mark.parametrize("start", [0.8, 2.2])
def test_a_trimmed_video_of_a_phone(start: float, rotation: int, tmp_path: Path) -> None:
    """A QuickTime file with an edit list that hides its first frames, and a rotation."""
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write rotation")
    write_video(tmp_path / "long.mov", FRAMES, RATE, gop=60)
    path = tmp_path / "cut.mov"
    with av.open(str(tmp_path / "long.mov")) as source, av.open(str(path), "w") as cut:
        stream = source.streams.video[0]
        copy: Any = cut.add_stream_from_template(stream)
        copy.set_display_rotation(rotation)
        assert stream.time_base is not None
        offset = int(start / stream.time_base)
        source.seek(offset, stream=stream, backward=True)
        for packet in source.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
                packet.stream = copy
                cut.mux(packet)
    stored = all_frames(path)
    assert len(stored) == FRAMES - round(start * RATE)
    check_frames(path, [np.rot90(frame, rotation // 90) for frame in stored])
    with Video(path) as video:
        (note,) = video.notes
    assert re.fullmatch(r"its edit list hides \d+ of \d+ frames", note), note


FRAGMENTS = {
    "first in the header": "frag_keyframe",
    "empty header": "frag_keyframe+empty_moov",
    "a frame each": "frag_every_frame+empty_moov",
    "dash": "frag_keyframe+dash+empty_moov",
    "list of all": "frag_keyframe+global_sidx+empty_moov+default_base_moof",
}
# A varying rate, whose last frames are shown long, and short.
SLOW_END = [0.0, 0.02, 0.12, 0.22, 0.25, 0.65, 0.7, 0.75, 1.15, 1.55, 1.6, 2.0, 2.4]
FAST_END = [0.0, 0.4, 0.5, 0.9, 1.3, 1.4, 1.8, 2.2, 2.22, 2.24, 2.26, 2.28]


@pytest.mark.parametrize("times", [None, SLOW_END, FAST_END], ids=["even", "slow end", "fast end"])
@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragments_are_counted(name: str, times: list[float] | None, tmp_path: Path) -> None:
    """How long the last frame lasts says nothing about the number of frames."""
    count, options = len(times or SLOW_END), {"movflags": FRAGMENTS[name]}
    path = write_video(tmp_path / "x.mp4", count, 25, SIZE, gop=5, times=times, options=options)
    with Video(path) as video:
        assert (video.frames, video.notes) == (len(all_frames(path)), ())
        assert video.frames == count
        assert all(frame.intact for frame in video.read(range(count)))


@pytest.mark.parametrize("times", [None, SLOW_END, FAST_END], ids=["even", "slow end", "fast end"])
@pytest.mark.parametrize("flags", ["faststart", *FRAGMENTS.values()])
def test_a_last_frame_that_is_cut_off_is_noticed(
    flags: str, times: list[float] | None, tmp_path: Path
) -> None:
    """What lists a frame is there, and the frame is not."""
    count, options = len(times or SLOW_END), {"movflags": flags}
    path = write_video(tmp_path / "x.mp4", count, 25, SIZE, gop=5, times=times, options=options)
    with av.open(str(path)) as container:
        last = max(p.pos for p in container.demux(video=0) if p.size and p.pos is not None)
    whole = path.read_bytes()
    path.write_bytes(whole[: last + 1])
    with Video(path) as video:
        if "every_frame" not in flags and "dash" not in flags:  # a list comes with each fragment
            assert video.frames == count
        try:
            intact = [frame.intact for frame in video.read(range(video.frames))]
        except InputError:
            return
    assert not all(intact)


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv", "webm"])
def test_a_last_frame_after_a_pause_is_no_loss(ending: str, tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.08, 6.0]
    codec = "libvpx" if ending == "webm" else "libx264"
    path = write_video(tmp_path / f"x.{ending}", 4, 25, SIZE, codec, times=times)
    with Video(path) as video:
        assert video.frames == len(all_frames(path)) == 4
        assert all(frame.intact for frame in video.read(range(4)))


def test_windows_media_that_begins_late(tmp_path: Path) -> None:
    """Its length counts from time stamp 0, and so does not say that frames are lost."""
    path = write_video(
        tmp_path / "x.wmv", 20, 25, SIZE, "wmv2", times=[9 + i / 25 for i in range(20)]
    )
    with Video(path) as video:
        assert (video.frames, video.notes) == (20, ())
    check_frames(path, all_frames(path))


def test_avi_of_a_varying_rate(tmp_path: Path) -> None:
    """Its header declares a frame for each millisecond, most of which are empty."""
    path = tmp_path / "x.avi"
    write_video(path, len(FAST_END), 25, SIZE, times=FAST_END)
    frames = all_frames(path)
    with Video(path) as video:
        assert video.frames == len(frames) == len(FAST_END)
        assert video.duration == pytest.approx(FAST_END[-1], abs=0.6)
        for frame in video.read(range(video.frames)):
            assert frame.intact and np.array_equal(frame.pixels, frames[frame.index])


@pytest.mark.parametrize("name", CONTAINERS)
def test_videos_of_one_frame(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x", name, frames=1)
    (expected,) = all_frames(path)
    with Video(path) as video:
        assert video.frames == 1
        assert video.duration > 0
        (frame,) = video.read([0])
        assert frame.intact and np.array_equal(frame.pixels, expected)


def test_frames_of_theora_with_one_time_stamp(tmp_path: Path) -> None:
    """In files of old encoders, FFmpeg gives the first two frames the same time. Each packet is a
    frame nevertheless."""
    path = write(tmp_path / "x", "ogg", 60)
    content = bytearray(path.read_bytes())
    version = content.index(b"\x80theora") + 7
    assert content[version : version + 3] == b"\3\2\1"
    content[version + 2] = 0
    content[22:26] = bytes(4)  # the checksum of the first page, which holds this header
    size = 27 + content[26] + sum(content[27 : 27 + content[26]])
    content[22:26] = struct.pack("<I", ogg_checksum(content[:size]))
    path.write_bytes(content)
    with av.open(str(path)) as container:
        first, second, *_ = (p.pts for p in container.demux(video=0) if p.size)
    assert first == second
    check_frames(path, all_frames(path))


def ogg_checksum(content: bytes) -> int:
    """Return the CRC-32 of a page, with the polynomial 0x04c11db7, unreflected."""
    value = 0
    for byte in content:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 1 << 31 else 0)
    return value & 0xFFFFFFFF


def test_frames_that_are_much_nearer_than_usual(tmp_path: Path) -> None:
    """A recording of a screen that seldom changes."""
    times = [0.0, 0.033, 0.067, 0.27, 0.54, *(i + 0.54 for i in range(1, 8)), 8.3, 8.34]
    path = write_video(tmp_path / "x.webm", len(times), RATE, codec="libvpx", times=times)
    with Video(path) as video:
        assert video.frames == len(all_frames(path)) == len(times)
