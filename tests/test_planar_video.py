"""Tests of videos whose frames stay planes: in RGB, each is the frame that `Video` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from hiera_core.data.video_files.planar_video import PlanarVideo
from hiera_core.data.video_files.video_reader import DecodedFrame, Video

from .test_video_reader import CLIP, cat, write_video
from .test_yuv_layout import BT709, BT2020, FULL, IS_X86, LIMITED

on_x86 = pytest.mark.skipif(not IS_X86, reason="swscale may compute in another way")


def rgb(frame: DecodedFrame) -> np.ndarray:
    if frame.layout is None:
        return frame.pixels
    pixels: np.ndarray = frame.layout.to_rgb(torch.from_numpy(frame.pixels)[None])[0].numpy()
    return pixels


def check_same(path: Path, **options: Any) -> list[DecodedFrame]:
    """Return the frames of a planar video, when they are compared with those of `Video`."""
    with Video(path) as plain, PlanarVideo(path, **options) as planar:
        indices = range(0, plain.frames, 2)
        found = list(planar.read(indices))
        for ours, theirs in zip(found, plain.read(indices), strict=True):
            assert (ours.index, ours.intact) == (theirs.index, theirs.intact)
            assert np.array_equal(rgb(ours), theirs.pixels)
    return found


def write_coloured(path: Path, colorspace: int, color_range: int, size: tuple[int, int]) -> Path:
    """Encode a photograph in colours that the file declares."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.colorspace = colorspace
        stream.codec_context.color_range = color_range
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(cat(*size), format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace=colorspace, dst_color_range=color_range
            )
            frame.colorspace, frame.color_range = colorspace, color_range
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@on_x86
@pytest.mark.parametrize("color_range", [LIMITED, FULL])
@pytest.mark.parametrize("colorspace", [BT709, BT2020])
def test_declared_colours_are_used(tmp_path: Path, colorspace: int, color_range: int) -> None:
    path = write_coloured(tmp_path / "x.mp4", colorspace, color_range, (96, 64))
    with av.open(str(path)) as container:
        first = next(container.decode(video=0))
    assert (first.colorspace, first.color_range) == (colorspace, color_range)
    (frame, _) = check_same(path)
    if int(av.__version__.partition(".")[0]) >= 17:  # earlier versions take BT.601 for all
        assert frame.layout is not None
        assert (frame.layout.conversion.black == 0) == (color_range == FULL)
        weights = {BT709: 14686, BT2020: 13752}
        assert (frame.layout.conversion.v_red == weights[colorspace]) == (color_range == LIMITED)


@on_x86
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.mp4", {"size": (130, 98)}),
        ("x.mkv", {"codec": "ffv1", "size": (97, 64)}),  # an odd width
        ("x.avi", {"codec": "mjpeg", "pixels": "yuvj420p"}),
        ("x.webm", {"codec": "libvpx-vp9", "size": (96, 64), "frames": 12}),
    ],
)
def test_frames_are_those_of_video(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    found = check_same(write_video(tmp_path / name, **{"frames": 20, **options}))
    width, height = options.get("size", (128, 96))
    for frame in found:
        assert frame.layout is not None and frame.layout.size == (height, width)
        assert frame.pixels.nbytes == frame.layout.nbytes


@on_x86
def test_the_bundled_clip_is_planar() -> None:
    assert all(frame.layout is not None for frame in check_same(CLIP))


@on_x86
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, rotation: int) -> None:
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write rotation")
    path = write_video(tmp_path / "x.mp4", frames=6, rotation=rotation)
    for frame in check_same(path):
        assert frame.layout is not None and frame.layout.turns % 4 == rotation // 90
        assert frame.layout.size == rgb(frame).shape[:2]


@on_x86
def test_damaged_frames_are_those_of_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", frames=60)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)
    found = check_same(path)
    assert not all(frame.intact for frame in found)
    assert all(frame.layout is not None for frame in found)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.mp4", {"pixels": "yuv444p"}),
        ("x.mp4", {"pixels": "yuv422p"}),
        ("x.mkv", {"codec": "ffv1", "pixels": "yuv420p10le"}),
        ("x.mkv", {"codec": "ffv1", "size": (96, 63)}),  # an odd height
    ],
)
def test_other_videos_are_rgb(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    found = check_same(write_video(tmp_path / name, **{"frames": 6, **options}))
    assert all(frame.layout is None for frame in found)


def test_interlaced_videos_are_rgb(tmp_path: Path) -> None:
    """Their rows take turns to belong to two pictures, and so do the rows of their colours."""
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=30, options={"x264-params": "tff=1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(cat(96, 64), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    assert all(frame.layout is None for frame in check_same(path))


def test_unwanted_planes_are_rgb(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", frames=6)
    asked: list[int] = []
    found = check_same(path, keeps=lambda layout: bool(asked.append(layout.nbytes)))
    assert all(frame.layout is None for frame in found)
    assert asked in ([128 * 96 * 3 // 2], []), "the answer is the same for all frames"


@on_x86
def test_a_size_that_changes_ends_the_planes(tmp_path: Path) -> None:
    parts = [
        write_video(tmp_path / f"{number}.h264", frames=10, size=size, gop=5)
        for number, size in enumerate([(96, 64), (128, 64), (96, 64)])
    ]
    path = tmp_path / "x.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with av.open(str(path)) as container:
        assert {frame.width for frame in container.decode(video=0)} == {96, 128}
    kinds = [frame.layout is not None for frame in check_same(path)]
    assert kinds == [True] * 5 + [False] * 10
