"""Tests of animations as videos: their frames, times and sizes, and which models see them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

import hiera_core
from hiera_core.data.video_files.animation_reader import Animation, is_animation, open_video
from hiera_core.data.video_files.video_reader import Video
from hiera_core.errors import InputError

from .test_video_reader import CLIP, picture

Command = Callable[..., tuple[int, str, str]]

FRAMES, SIZE = 24, (96, 64)
FORMATS = {"GIF": "x.gif", "WEBP": "x.webp", "PNG": "x.png", "AVIF": "x.avif"}


def write_animation(path: Path, frames: int = FRAMES, durations: int | list[int] = 40) -> Path:
    """Write a moving photograph with a transparent corner."""
    images = []
    for i in range(frames):
        image = Image.fromarray(picture(i / 25, *SIZE)).convert("RGBA")
        image.paste((0, 0, 0, 0), (0, 0, 20, 10 + i % 7))
        images.append(image)
    options = {"quality": 90} if path.suffix == ".avif" else {"lossless": True, "disposal": 2}
    try:
        images[0].save(path, save_all=True, append_images=images[1:], duration=durations, **options)
    except (KeyError, OSError, ValueError) as error:
        pytest.skip(f"this Pillow cannot write it: {error}")
    return path


def all_frames(path: Path) -> list[np.ndarray]:
    """Decode an animation from its start, with Pillow alone, on white."""
    frames = []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            canvas = Image.new("RGBA", frame.size, "white")
            canvas.alpha_composite(frame.convert("RGBA"))
            frames.append(np.asarray(canvas.convert("RGB")))
    return frames


@pytest.mark.parametrize("format", FORMATS)
def test_frames_are_those_of_sequential_decoding(format: str, tmp_path: Path) -> None:
    path = write_animation(tmp_path / FORMATS[format])
    expected = all_frames(path)
    for indices in (range(FRAMES), range(FRAMES - 1, 0, -5), [3, 20], [17]):
        with open_video(path) as video:
            assert isinstance(video, Animation)
            assert (video.frames, video.notes) == (FRAMES, ())
            assert (video.fps, video.duration) == (pytest.approx(25), pytest.approx(FRAMES / 25))
            for frame in video.read(list(indices)):
                assert frame.intact
                # A rounding error where pixels are half transparent, which AVIF makes.
                difference = np.abs(frame.pixels.astype(int) - expected[frame.index])
                assert difference.max() <= (1 if format == "AVIF" else 0), frame.index


def test_the_time_decides_which_frame_is_shown(tmp_path: Path) -> None:
    path = write_animation(tmp_path / "x.webp", 5, [100, 100, 600, 100, 100])
    expected = all_frames(path)
    with open_video(path) as video:  # every 0.2 s
        assert (video.frames, video.fps) == (5, pytest.approx(5))
        shown = [frame.pixels for frame in video.read(range(5))]
    for pixels, index in zip(shown, [0, 2, 2, 2, 3], strict=True):
        assert np.array_equal(pixels, expected[index])


def test_frames_without_a_duration_last_as_long_as_in_browsers(tmp_path: Path) -> None:
    with open_video(write_animation(tmp_path / "x.gif", 4, 0)) as video:
        assert video.fps == pytest.approx(10)


def test_images_of_one_frame_are_no_animations(tmp_path: Path, pictures: Path) -> None:
    for name in ("x.gif", "x.webp", "x.png"):
        Image.new("RGB", SIZE, "red").save(tmp_path / name)
        assert not is_animation(tmp_path / name)
    assert not any(is_animation(path) for path in pictures.iterdir())
    assert not is_animation(tmp_path / "missing.gif")


@pytest.mark.parametrize("format", FORMATS)
def test_truncation_is_never_silent(format: str, tmp_path: Path) -> None:
    path = write_animation(tmp_path / FORMATS[format])
    whole, expected = path.read_bytes(), all_frames(path)
    errors = 0
    for step in range(1, 16):
        try:
            with open_video(whole[: len(whole) * step // 16]) as video:
                for frame in video.read(range(video.frames)):
                    same = np.abs(frame.pixels.astype(int) - expected[frame.index]).max() <= 1
                    assert same or not frame.intact, (step, frame.index)
        except InputError:
            errors += 1
    # A GIF does not declare how many frames it has.
    assert errors > (0 if format == "GIF" else 12)


def gif(canvas: tuple[int, int], area: tuple[int, int], disposal: int) -> bytes:
    """Return a GIF of 1x1 pixels whose second frame says that it covers `area`."""
    frame = b"\x21\xf9\x04" + bytes([disposal << 2]) + b"\x0a\0\0\0"
    frame += b"\x2c\0\0\0\0" + struct.pack("<HH", 1, 1) + b"\0\x02\x02\x44\x01\0"
    second = frame.replace(struct.pack("<HH", 1, 1), struct.pack("<HH", *area))
    return (
        b"GIF89a"
        + struct.pack("<HH", *canvas)
        + b"\x80\0\0\0\0\0\xff\xff\xff"
        + frame
        + second
        + b";"
    )


def png(area: tuple[int, int], disposal: int, declared: int = 2) -> bytes:
    """Return a PNG animation of 1x1 pixels whose second frame says that it covers `area`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    def control(number: int, size: tuple[int, int]) -> bytes:
        return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, *size, 0, 0, 1, 10, disposal, 0))

    data = zlib.compress(b"\0\0\0\0")
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
        + chunk(b"acTL", struct.pack(">II", declared, 0))
        + control(0, (1, 1))
        + chunk(b"IDAT", data)
        + control(1, area)
        + chunk(b"fdAT", struct.pack(">I", 2) + data)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
@pytest.mark.parametrize("format", ["GIF", "PNG"])
def test_areas_of_frames_are_checked_before_they_are_allocated(
    format: str, disposal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if format == "GIF":
        content = gif((1, 1), (65535, 65535), disposal)
    else:
        content = png((60000, 60000), min(disposal, 2))
    is_animation(content)  # loads Pillow's readers, which allocate too
    allocated: list[int] = []
    for name in ("fill", "new"):
        allocate = getattr(Image.core, name)

        def count(mode: str, size: tuple[int, int], *rest: object, call: Any = allocate) -> object:
            allocated.append(size[0] * size[1])
            return call(mode, (min(size[0], 9), min(size[1], 9)), *rest)

        monkeypatch.setattr(Image.core, name, count)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    try:
        with open_video(content, max_pixels=1000) as video:
            assert [frame.intact for frame in video.read(range(video.frames))].count(True) <= 1
    except InputError:
        pass
    assert max(allocated, default=0) <= 1000


def test_a_declared_number_of_frames_is_checked_before_they_are_listed() -> None:
    with open_video(png((1, 1), 0)) as video:
        assert video.frames == 2
    with pytest.raises(InputError, match="of 2000000000 frames are damaged or lost"):
        open_video(png((1, 1), 0, declared=2_000_000_000))


def test_animations_that_would_take_hours_are_refused() -> None:
    content = gif((100, 100), (1, 1), 0)
    frame = content[-24:-1]
    assert frame.startswith(b"\x21\xf9") and content.endswith(frame + b";")
    content = content[:-1] + 198 * frame + b";"
    with open_video(content, max_pixels=20_000) as video:
        assert video.frames == 200
    with pytest.raises(InputError, match="200 frames of 100x100 pixels take too long"):
        open_video(content, max_pixels=19_000)


def test_models_for_images_see_the_first_frame_and_models_for_videos_all(
    tmp_path: Path, hiera: Command
) -> None:
    path = write_animation(tmp_path / "x.gif")
    image = hiera_core.predict(path, "hiera_nano_32")
    assert (image["kind"], image["notes"][0]) == ("image", f"first of {FRAMES} frames")
    video = hiera_core.predict(path, "hiera_nano_8x32")
    assert (video["kind"], video["status"], video["video"]["frames"]) == ("video", "ok", FRAMES)
    _, out, _ = hiera("predict", path, "-m", "hiera_nano_32", "--every", "0.4", "-f", "json")
    (record,) = json.loads(out)
    assert (record["kind"], len(record["segments"])) == ("video", 3)
    code, _, _ = hiera("mae", path, "-m", "mae_hiera_nano_8x32", "-o", tmp_path / "out")
    assert code == 0
    assert any(file.suffix == ".mp4" for file in (tmp_path / "out").rglob("*"))


def test_a_still_image_is_no_input_of_a_video_model(tmp_path: Path) -> None:
    Image.new("RGB", SIZE).save(tmp_path / "x.gif")
    record = hiera_core.predict(tmp_path / "x.gif", "hiera_nano_8x32")
    assert "a picture" in record["error"]["message"]


def test_files_of_videos_are_no_animations() -> None:
    with open_video(CLIP) as video:
        assert isinstance(video, Video)
