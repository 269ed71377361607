"""Tests of planes in RGB: bit for bit the pixels of swscale, for all colours that a frame can have.

Where the library computes otherwise than on x86 processors, frames are not kept as planes."""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter

from hiera_core.data.video_files import planar_video, yuv_layout
from hiera_core.data.video_files.frame_colours import frame_to_rgb
from hiera_core.data.video_files.planar_video import layout_of
from hiera_core.data.video_files.yuv_layout import WEIGHTS, Conversion, YuvLayout

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
UNSPECIFIED, BT709, FCC, BT470, BT601, SMPTE_240M, BT2020 = 2, 1, 4, 5, 6, 7, 9  # AVColorSpace
LIMITED, FULL = 1, 2  # AVColorRange
BY_COLORSPACE = {
    UNSPECIFIED: "BT.601",
    BT709: "BT.709",
    FCC: "FCC",
    BT470: "BT.601",
    BT601: "BT.601",
    SMPTE_240M: "SMPTE 240M",
    BT2020: "BT.2020",
}


def frame_of(
    width: int,
    height: int,
    planes: list[np.ndarray] | None = None,
    pixels: str = "yuv420p",
    colorspace: int = UNSPECIFIED,
    color_range: int = 0,
) -> Any:
    """Return a frame of PyAV. Its levels are random unless they are given."""
    frame = av.VideoFrame(width, height, pixels)
    generator = np.random.default_rng(width + height)
    for number, plane in enumerate(frame.planes):
        levels = generator.integers(0, 256, (plane.height, plane.line_size), np.uint8)
        if planes is not None:
            levels[:, : plane.width] = planes[number]
        plane.update(levels)
    frame.colorspace, frame.color_range = colorspace, color_range
    return frame


def by_swscale(frame: Any) -> np.ndarray:
    return frame_to_rgb(VideoReformatter(), frame, frame.width, frame.height)


def by_planes(frame: Any, layout: YuvLayout) -> np.ndarray:
    pixels: np.ndarray = layout.to_rgb(torch.from_numpy(layout.pack(frame))[None])[0].numpy()
    return pixels


def known_layout(frame: Any) -> YuvLayout:
    """Return the layout of a frame, which has one where swscale is that of x86 processors."""
    layout = layout_of(frame)
    if layout is None and not IS_X86:
        pytest.skip("swscale computes in another way on this processor")
    assert layout is not None
    return layout


@pytest.mark.parametrize("color_range", [0, LIMITED, FULL])
@pytest.mark.parametrize("colorspace", BY_COLORSPACE)
@pytest.mark.parametrize("pixels", ["yuv420p", "yuvj420p"])
def test_rgb_is_that_of_swscale(colorspace: int, color_range: int, pixels: str) -> None:
    frame = frame_of(256, 128, None, pixels, colorspace, color_range)
    layout = known_layout(frame)
    expected = by_swscale(frame)
    assert np.array_equal(by_planes(frame, layout), expected)
    assert expected.min() == 0 and expected.max() == 255
    is_full = color_range == FULL or pixels == "yuvj420p"
    if int(av.__version__.partition(".")[0]) >= 17:  # earlier versions take BT.601 for all
        assert layout.conversion == Conversion.of(*WEIGHTS[BY_COLORSPACE[colorspace]], is_full)


@pytest.mark.parametrize("colorspace", [BT601, BT709])
def test_every_colour_is_that_of_swscale(colorspace: int) -> None:
    """All 2^24 colours: 64 blocks of four levels of Y, each with all pairs of U and V."""
    u, v = (np.ascontiguousarray(a, np.uint8) for a in np.mgrid[:256, :256])
    for first in range(0, 256, 64):
        y = np.zeros((512, 16 * 512), np.uint8)
        for block in range(16):
            for corner in range(4):
                level = first + 4 * block + corner
                y[corner // 2 :: 2, 512 * block + corner % 2 : 512 * (block + 1) : 2] = level
        planes = [y, np.tile(u, 16), np.tile(v, 16)]
        frame = frame_of(16 * 512, 512, planes, colorspace=colorspace, color_range=LIMITED)
        assert np.array_equal(by_planes(frame, known_layout(frame)), by_swscale(frame))


@pytest.mark.parametrize("height", [2, 6, 50])
@pytest.mark.parametrize("width", [*range(1, 36), 63, 97, 129, 255, 638])
def test_frames_of_any_width_are_those_of_swscale(width: int, height: int) -> None:
    frame = frame_of(width, height)
    layout = known_layout(frame)
    assert layout.nbytes == width * height + 2 * ((width + 1) // 2) * (height // 2)
    assert np.array_equal(by_planes(frame, layout), by_swscale(frame))


@pytest.mark.parametrize("turns", [-1, 0, 1, 2, 3])
def test_frames_are_turned_upright(turns: int) -> None:
    frame = frame_of(32, 18)
    layout = replace(known_layout(frame), turns=turns)
    expected = np.rot90(by_swscale(frame), turns)
    assert layout.size == expected.shape[:2]
    assert np.array_equal(by_planes(frame, layout), expected)


@pytest.mark.parametrize(
    ("pixels", "colorspace", "height"),
    [
        ("yuv444p", UNSPECIFIED, 16),
        ("yuv420p10le", UNSPECIFIED, 16),
        ("nv12", UNSPECIFIED, 16),
        ("rgb24", UNSPECIFIED, 16),
        ("yuv420p", 8, 16),  # YCgCo
        ("yuv420p", UNSPECIFIED, 17),  # swscale mixes the colours of rows
    ],
)
def test_other_frames_have_no_layout(pixels: str, colorspace: int, height: int) -> None:
    assert layout_of(frame_of(32, height, None, pixels, colorspace)) is None


def test_interlaced_frames_have_no_layout() -> None:
    class Interlaced:
        interlaced_frame = True

        def __getattr__(self, name: str) -> Any:
            return getattr(self.frame, name)

        frame = frame_of(32, 16)

    known_layout(Interlaced.frame)
    assert layout_of(Interlaced()) is None


def test_another_rounding_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison on noise is what makes the pixels safe on processors that nobody has tried."""
    known_layout(frame_of(48, 16))
    monkeypatch.setattr(
        yuv_layout, "_product", lambda x, c: (x * c + (1 << 15) >> 16).to(torch.int16)
    )
    planar_video._find_conversion.cache_clear()
    try:
        assert layout_of(frame_of(48, 16)) is None
    finally:
        planar_video._find_conversion.cache_clear()


@pytest.mark.cuda
def test_a_gpu_makes_the_same_rgb() -> None:
    frame = frame_of(638, 360, colorspace=BT709)
    layout = known_layout(frame)
    packed = torch.from_numpy(layout.pack(frame))[None].cuda()
    found = layout.to_rgb(packed)
    assert found.is_cuda and np.array_equal(found[0].cpu().numpy(), by_swscale(frame))
