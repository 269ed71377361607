"""Tests of videos: SlowFast's sampling rules, seeking, faults, and `hiera predict` on clips."""

from __future__ import annotations

import functools
import io
import json
import math
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import hiera as reference
import numpy as np
import pytest
import torch
from torch.nn import functional

import hiera_core
from hiera_core.data.clip_reader import read_segments
from hiera_core.data.clip_sampling import Sampling, clip_indices, crop_offsets
from hiera_core.data.transforms import VideoTransform, scaled_size
from hiera_core.data.video_files.video_reader import Video
from hiera_core.errors import InputError, UsageError

from .conftest import assert_close, draw_weights

Command = Callable[..., tuple[int, str, str]]
CLIP = Path(hiera_core.__file__).parent / "zoo" / "assets" / "samples" / "moving_right.mp4"
# A narrow and shallow Hiera for videos.
SMALL_VIDEO = {
    "embed_dim": 16,
    "stages": (1, 1, 2, 1),
    "num_classes": 10,
    "input_size": (16, 64, 64),
    "q_stride": (1, 2, 2),
    "mask_unit_size": (1, 8, 8),
    "patch_kernel": (3, 7, 7),
    "patch_stride": (2, 4, 4),
    "patch_padding": (1, 3, 3),
    "sep_pos_embed": True,
}


def picture(seconds: float, width: int, height: int) -> np.ndarray:
    """Return a frame of a moving photograph. It differs from moment to moment."""
    shift = int(seconds * 40)
    return np.roll(cat(width, height), (shift % height, 3 * shift % width), (0, 1))


@functools.cache
def cat(width: int, height: int) -> np.ndarray:
    """Return a photograph of a cat."""
    import skimage.data

    rows, columns = np.arange(height) * 300 // height, np.arange(width) * 450 // width
    return np.ascontiguousarray(skimage.data.chelsea()[rows][:, columns])


def write_video(
    path: Path,
    frames: int = 90,
    fps: Fraction | int = 30,
    size: tuple[int, int] = (128, 96),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    gop: int = 30,
    times: list[float] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    sound: bool = False,
) -> Path:
    """Encode a moving photograph. With `times`, in seconds, the frame rate is variable."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.gop_size = gop
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        audio_stream: Any = container.add_stream("aac", rate=8000) if sound else None
        for i in range(frames):
            seconds = times[i] if times else float(i / Fraction(fps))
            frame = av.VideoFrame.from_ndarray(picture(seconds, *size), format="rgb24")
            if times is not None:
                frame.time_base, frame.pts = Fraction(1, 1000), round(seconds * 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 8000 * 6), np.float32), format="fltp", layout="mono"
            )
            silence.sample_rate = 8000
            container.mux(audio_stream.encode(silence))
            container.mux(audio_stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video of six seconds at 30 frames per second, with a key frame every second."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=180)


@pytest.fixture(scope="session")
def small_video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small_video")
    draw_weights(hiera_core.Hiera(**SMALL_VIDEO)).save_pretrained(folder)
    return folder


def all_frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


# Sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fps", "frames", "clips", "expected"),
    [
        # Computed by hand: span = 16 * 4 / 30 * fps, starts = k * floor((n - span) / (K - 1)),
        # frames = trunc(start + i * (span - 1) / 15), at most n - 1.
        (30, 150, 5, {0: (0, 63), 2: (42, 105), 4: (84, 147)}),
        (24, 240, 5, {0: (0, 50), 1: (47, 97), 4: (188, 238)}),
        (25, 250, 3, {0: (0, 52), 1: (98, 150), 2: (196, 248)}),
        (60, 300, 2, {0: (0, 127), 1: (172, 299)}),
        (30000 / 1001, 300, 5, {0: (0, 62), 1: (59, 121), 4: (236, 298)}),
        (30, 150, 1, {0: (43, 106)}),
        (30, 40, 5, {0: (0, 39), 4: (0, 39)}),
        (60, 1, 5, {0: (0, 0), 4: (0, 0)}),
    ],
)
def test_frames_of_clips_follow_slowfast(
    fps: float, frames: int, clips: int, expected: dict[int, tuple[int, int]]
) -> None:
    indices = clip_indices(frames, fps, clips)
    assert indices.shape == (clips, 16) and indices.dtype == np.int64
    for clip, (first, last) in expected.items():
        assert (indices[clip, 0], indices[clip, -1]) == (first, last)
        span = 64 / 30 * fps
        exact = [min(math.floor(first + i * (span - 1) / 15 + 1e-6), frames - 1) for i in range(16)]
        assert indices[clip].tolist() == exact


def test_frames_of_one_clip_computed_by_hand() -> None:
    """At 30 frames per second, a step is 63 / 15 = 4.2 frames."""
    expected = [0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63]
    assert clip_indices(64, 30, 1)[0].tolist() == expected
    # At 24 frames per second, the span is 51.2 frames and a step 50.2 / 15. The video has only 40
    # frames, so the last one is repeated.
    expected = [0, 3, 6, 10, 13, 16, 20, 23, 26, 30, 33, 36, 39, 39, 39, 39]
    assert clip_indices(40, 24, 1)[0].tolist() == expected


def test_crop_offsets_and_scaled_sizes_follow_slowfast() -> None:
    assert crop_offsets(398, 224, 3) == [0, 87, 174]
    assert crop_offsets(299, 224, 3) == [0, 38, 75], "the centre is rounded up"
    assert crop_offsets(299, 224, 1) == [38]
    assert scaled_size(1080, 1920, 224) == (224, 398)
    assert scaled_size(1920, 1080, 224) == (398, 224)
    assert scaled_size(100, 100, 224) == (224, 224)


@pytest.mark.parametrize("size", [(192, 108), (108, 192), (130, 97), (320, 16)])
def test_views_follow_slowfast(tmp_path: Path, size: tuple[int, int]) -> None:
    """Compare landscape, portrait, odd and extreme sizes with torch's interpolate and slices."""
    pixels = "yuv444p" if size[1] % 2 else "yuv420p"
    path = write_video(tmp_path / "x.mp4", frames=90, size=size, pixels=pixels)
    frames = torch.from_numpy(np.stack(all_frames(path))).float().permute(0, 3, 1, 2)
    transform = VideoTransform.from_preprocessing(None, (16, 224, 224))
    _, segments = read_segments(path, Sampling(clips=2), transform)
    (segment,) = segments
    assert len(segment.views) == 6
    height, width = scaled_size(size[1], size[0], 224)
    long = max(height, width) - 224
    for view in range(6):
        chosen = frames[clip_indices(90, 30, 2)[view // 3]]
        resized = functional.interpolate(
            chosen, (height, width), mode="bilinear", align_corners=False
        )
        offset = (0, math.ceil(long / 2), long)[view % 3]
        top, left = (offset, 0) if height > width else (0, offset)
        theirs = resized[:, :, top : top + 224, left : left + 224].permute(0, 2, 3, 1)
        assert_close(torch.from_numpy(np.array(segment.views[view])), theirs, 1e-4)


@torch.no_grad()
def test_probabilities_over_15_views_match_the_reference(
    hiera: Command, clip: Path, tmp_path: Path
) -> None:
    """The paper's evaluation: 5 clips x 3 crops, probabilities averaged."""
    model = draw_weights(reference.Hiera(**SMALL_VIDEO)).eval()
    model.save_pretrained(tmp_path / "theirs", config=model.config)
    frames = torch.from_numpy(np.stack(all_frames(clip))).float().permute(3, 0, 1, 2) / 255
    frames = (frames - 0.45) / 0.225  # c t y x
    total = torch.zeros(10)
    for clip_number in range(5):
        indices = torch.from_numpy(clip_indices(180, 30, 5)[clip_number])
        width = math.floor(128 / 96 * 64)
        resized = functional.interpolate(
            frames[:, indices], (64, width), mode="bilinear", align_corners=False
        )
        for left in (0, math.ceil((width - 64) / 2), width - 64):
            total += model(resized[None, ..., left : left + 64])[0]
    probs, ids = (total / 15).topk(5)
    code, out, _ = hiera("predict", clip, "-m", tmp_path / "theirs", "--dtype", "fp32")
    record = json.loads(out)
    assert code == 0 and record["kind"] == "video" and record["status"] == "ok"
    assert [g["id"] for g in record["topk"]] == ids.tolist()
    assert_close(torch.tensor([g["prob"] for g in record["topk"]]), probs, 1e-4)
    unique = len(np.unique(clip_indices(180, 30, 5)))
    assert record["video"] == {
        "duration": 6.0, "fps": 30.0, "frames": 180, "used": unique, "damaged": 0, "views": 15,
    }  # fmt: skip


# Reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("x.mp4", "libx264", "yuv420p"),
        ("x.mkv", "libx264", "yuv420p10le"),
        ("x.webm", "libvpx-vp9", "yuv420p"),
        ("x.webm", "libvpx", "yuv420p"),
        ("x.avi", "mpeg4", "yuv420p"),
        ("x.mov", "mjpeg", "yuvj420p"),
        ("x.ts", "mpeg2video", "yuv420p"),
        ("x.mpg", "mpeg2video", "yuv420p"),
        ("x.flv", "flv1", "yuv420p"),
    ],
)
def test_seeking_returns_the_frames_of_sequential_decoding(
    tmp_path: Path, name: str, codec: str, pixels: str
) -> None:
    path = write_video(tmp_path / name, frames=120, codec=codec, pixels=pixels)
    frames = all_frames(path)
    indices = [0, 1, 15, 58, 59, 62, 100, 119]
    with Video(path) as video:
        assert abs(video.frames - 120) <= 1 and video.fps == pytest.approx(30, rel=0.02)
        for frame in video.read([i for i in indices if i < len(frames)]):
            assert frame.intact, frame.index
            assert np.array_equal(frame.pixels, frames[frame.index]), frame.index
    with Video(path.read_bytes()) as video:
        (frame,) = video.read([62])
        assert np.array_equal(frame.pixels, frames[62])


def test_variable_rate_is_sampled_by_time(tmp_path: Path) -> None:
    """10 frames per second for three seconds, then 40. Frame i is the one at the time i / fps."""
    times = [i / 10 for i in range(30)] + [3 + i / 40 for i in range(120)]
    path = write_video(tmp_path / "x.mkv", frames=150, times=times, gop=15)
    frames = all_frames(path)
    with Video(path) as video:
        for frame in video.read(range(0, video.frames, 7)):
            seconds = frame.index / video.fps + 0.25 / video.fps
            expected = max(i for i, t in enumerate(times) if t <= seconds + 1e-3)
            assert np.array_equal(frame.pixels, frames[expected]), frame.index
            assert frame.intact


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, rotation: int) -> None:
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write rotation")
    path = write_video(tmp_path / "x.mp4", frames=30, rotation=rotation)
    stored = all_frames(path)[0]
    with Video(path) as video:
        (frame,) = video.read([0])
    # The metadata is the counterclockwise angle by which a player rotates the stored frame.
    assert np.array_equal(frame.pixels, np.rot90(stored, rotation // 90))


def test_short_videos_repeat_their_last_frame(
    hiera: Command, small_video_folder: Path, tmp_path: Path
) -> None:
    """If a video is shorter than a clip, its record has a note."""
    for frames in (1, 20):
        path = write_video(tmp_path / f"{frames}.mp4", frames=frames)
        code, out, _ = hiera("predict", path, "-m", small_video_folder)
        record = json.loads(out)
        assert code == 0 and record["status"] == "ok" and record["video"]["frames"] == frames
        assert f"shorter than a clip ({frames} frames)" in record["notes"][0]
        assert record["video"]["used"] == min(frames, len(np.unique(clip_indices(frames, 30, 1))))


def test_sound_may_be_longer_than_the_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mkv", frames=90, sound=True)
    with Video(path) as video:
        assert abs(video.frames - 90) <= 1
        assert all(frame.intact for frame in video.read([0, 45, video.frames - 1]))


def test_decoding_cost_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """A video that is ten times as long needs at most 1.5 times as many decoded frames."""
    decoded = []
    for frames in (600, 6_000):
        path = write_video(tmp_path / f"{frames}.mp4", frames, size=(32, 32), gop=60, codec="mpeg4")
        with Video(path) as video:
            count, decode = 0, video._decode

            def counting(decode: Any = decode) -> Any:
                nonlocal count
                for frame in decode():
                    count += 1
                    yield frame

            video._decode = counting  # type: ignore[method-assign]
            list(video.read(np.unique(clip_indices(frames, 30, 5)).tolist()))
        decoded.append(count)
    assert decoded[1] <= 1.5 * decoded[0], decoded


# `hiera predict` --------------------------------------------------------------------------------


def test_segments_are_classified(hiera: Command, small_video_folder: Path, clip: Path) -> None:
    arguments = ("predict", clip, "-m", small_video_folder, "--dtype", "fp32", "--segments", "2.5")
    code, out, _ = hiera(*arguments)
    record = json.loads(out)
    assert code == 0
    assert [(s["start"], s["end"]) for s in record["segments"]] == [(0, 2.5), (2.5, 5), (5, 6)]
    assert record["video"]["views"] == 3
    # The first segment alone: one clip in the middle of its 75 frames, with the centre crop.
    predictor = hiera_core.Predictor(str(small_video_folder), dtype="fp32")
    classifier = predictor.classifier("video")
    frames = all_frames(clip)
    transform = classifier.transform
    _, segments = read_segments(clip, Sampling(segments=2.5), transform)
    view = np.array(next(segments).views[0])
    middle = functional.interpolate(
        torch.from_numpy(frames[5])[None].permute(0, 3, 1, 2).float(),
        (64, 85),
        mode="bilinear",
        align_corners=False,
    )[0, :, :, 11:75]
    assert_close(torch.from_numpy(view[0]).permute(2, 0, 1), middle, 1e-5)
    probs = classifier([view])[0]
    top = record["segments"][0]["topk"][0]
    assert top["prob"] == pytest.approx(probs.max().item(), abs=1e-5)
    _, table, _ = hiera(*arguments, "-f", "table")
    assert "0:00:02.5 - 0:00:05.0" in table
    _, rows, _ = hiera(*arguments, "-f", "csv")
    assert "segments" in rows.splitlines()[0]


def test_pictures_and_videos_need_models_of_their_kind(
    hiera: Command, small_folder: Path, small_video_folder: Path, clip: Path, pictures: Path
) -> None:
    photo = pictures / "coffee.png"
    code, out, err = hiera("predict", photo, clip, photo, "-m", small_folder)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [r["status"] for r in records] == ["ok", "error", "ok"]
    assert "--every SECONDS" in err and records[1]["kind"] == "video"
    code, out, err = hiera("predict", photo, clip, "-m", small_video_folder)
    assert code == 1 and "takes video clips" in err
    assert [json.loads(line)["status"] for line in out.splitlines()] == ["error", "ok"]

    code, out, _ = hiera("predict", photo, clip, "-m", small_folder, "--every", "2")
    still, moving = (json.loads(line) for line in out.splitlines())
    assert code == 0 and "segments" not in still
    assert [s["start"] for s in moving["segments"]] == [0, 2, 4]
    code, _, err = hiera("predict", clip, "-m", small_video_folder, "--every", "2")
    assert code == 2 and "--segments" in err


def test_fps_is_the_rate_of_the_stride(
    hiera: Command, small_video_folder: Path, clip: Path, tmp_path: Path
) -> None:
    """A stride of 2 at 15 per second equals a stride of 4 at 30, the rate of the model."""
    transform = hiera_core.Predictor(str(small_video_folder)).classifier("video").transform
    assert transform.fps == 30
    sampled = []
    for sampling in (Sampling(stride=2, fps=15), Sampling(stride=4), Sampling(stride=2)):
        (segment,) = read_segments(clip, sampling, transform)[1]
        sampled.append([np.array(view) for view in segment.views])
    assert np.array_equal(sampled[0], sampled[1])
    assert not np.array_equal(sampled[0], sampled[2])

    for command in (["predict"], ["features"], ["mae", "-o", str(tmp_path / "a")]):
        code, out, err = hiera(*command, clip, "--fps", "0")
        assert (code, out) == (2, "") and "fps is 0.0" in err
    arguments = ("predict", clip, "-m", small_video_folder, "--dtype", "fp32", "--stride")
    _, lower, _ = hiera(*arguments, "2", "--fps", "15")
    _, default, _ = hiera(*arguments, "4")
    _, other, _ = hiera(*arguments, "2")
    assert lower == default != other
    arguments = ("features", clip, "-m", small_video_folder, "--dtype", "fp32", "--stride")
    _, lower, _ = hiera(*arguments, "2", "--fps", "15")
    _, default, _ = hiera(*arguments, "4")
    assert lower == default and json.loads(lower)["status"] == "ok"


def test_the_input_decides_which_model_is_loaded(clip: Path, pictures: Path) -> None:
    built = []

    def build(kind: Any) -> hiera_core.Hiera:
        built.append(kind)
        from .conftest import SMALL

        return hiera_core.Hiera(**(SMALL if kind == "image" else SMALL_VIDEO))

    predictor = hiera_core.Predictor(build)
    assert built == [], "no model is loaded before it is needed"
    sources = hiera_core.data.sources.expand([str(pictures), str(clip), str(pictures)])
    records = list(predictor(sources))
    assert [r.kind for r in records] == ["image"] * 4 + ["video"] + ["image"] * 4
    assert all(r.status == "ok" for r in records) and sorted(built) == ["image", "video"]


def test_sampling_options_must_be_positive() -> None:
    for options in ({"clips": 0}, {"segments": -1.0}, {"every": math.inf}, {"stride": 0}):
        with pytest.raises(UsageError, match="above 0"):
            Sampling(**options)  # type: ignore[arg-type]


# Faults -----------------------------------------------------------------------------------------


def test_files_that_are_not_videos_are_errors(
    hiera: Command, small_video_folder: Path, clip: Path, tmp_path: Path
) -> None:
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXTINF:6,\n{clip}\n")
    concat = tmp_path / "concat.mp4"
    concat.write_text(f"ffconcat version 1.0\nfile {clip}\n")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "head.mp4").write_bytes(clip.read_bytes()[:40])
    code, out, err = hiera("predict", tmp_path, "-m", small_video_folder)
    records = {Path(r["input"]).name: r for r in map(json.loads, out.splitlines())}
    assert code == 1 and len(records) == 6 and "Traceback" not in err
    assert all(r["status"] == "error" and r["kind"] == "video" for r in records.values())
    assert "no video stream" in records["sound.mp4"]["error"]["message"]
    assert "empty" in records["empty.mp4"]["error"]["message"]


def test_large_frames_are_refused_by_their_header(
    hiera: Command, small_video_folder: Path, clip: Path
) -> None:
    code, _, err = hiera("predict", clip, "-m", small_video_folder, "--max-pixels", "1000")
    assert code == 1 and "128x96 pixels are more than 1000" in err


@pytest.mark.parametrize("container", ["avi", "matroska", "mpegts"])
@pytest.mark.parametrize("side", [128, 3072])
def test_frames_that_grow_within_a_stream_are_refused(container: str, side: int) -> None:
    """The header tells the size of the first frame only. Those that are much larger are not
    decoded at all, and count as damaged."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream("libx264", rate=10, options={"tune": "zerolatency"})
        stream.width = stream.height = 64
        packets = [p for i in range(60) for p in stream.encode(noise(64))]
        large: Any = av.CodecContext.create("libx264", "w")
        large.width = large.height = side
        large.pix_fmt, large.time_base, large.framerate = "yuv420p", Fraction(1, 10), Fraction(10)
        large.options = {"tune": "zerolatency", "preset": "ultrafast"}
        packets += large.encode(noise(side))
        for number, packet in enumerate(packets):
            packet.stream, packet.time_base = stream, Fraction(1, 10)
            packet.pts = packet.dts = number
            output.mux(packet)
    with Video(file.getvalue(), max_pixels=10_000) as video:
        assert (video.width, video.frames) == (64, 61)
        if side == 128:
            with pytest.raises(InputError, match="128x128 pixels are more than 10000"):
                list(video.read(range(61)))
        else:
            assert [frame.intact for frame in video.read(range(50, 61))] == [True] * 10 + [False]


def noise(side: int) -> av.VideoFrame:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    return av.VideoFrame.from_ndarray(pixels, format="rgb24")


@pytest.mark.parametrize("name", ["x.mp4", "fast.mp4", "x.mkv"])
def test_every_truncation_is_detected(tmp_path: Path, name: str) -> None:
    """A truncated file gives an error, damaged frames, or exactly the pixels of the whole file."""
    options = {"movflags": "+faststart"} if name == "fast.mp4" else {}
    path = write_video(tmp_path / name, frames=90, size=(64, 48), options=options)
    whole = path.read_bytes()
    transform = VideoTransform.from_preprocessing(None, (16, 64, 64))

    def pixels(content: bytes) -> tuple[Any, int]:
        report, segments = read_segments(content, Sampling(), transform)
        (segment,) = segments
        return segment.views.frames, report.damaged  # type: ignore[attr-defined]

    expected, damaged = pixels(whole)
    assert damaged == 0
    outcomes = {"error": 0, "partial": 0, "same": 0}
    for step in range(64):
        try:
            found, damaged = pixels(whole[: len(whole) * step // 64])
        except InputError:
            outcomes["error"] += 1
            continue
        if damaged:
            outcomes["partial"] += 1
        else:
            assert np.array_equal(found, expected), f"cut at {step}/64: other pixels, but no error"
            outcomes["same"] += 1
    assert outcomes["error"] > 40, outcomes


def test_damaged_frames_are_counted(tmp_path: Path) -> None:
    """Whatever is damaged, the report counts the frames that are used."""
    path = write_video(tmp_path / "x.mp4", frames=90, size=(64, 48))
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    transform = VideoTransform.from_preprocessing(None, (16, 64, 64))
    frame_count = len(np.unique(clip_indices(90, 30, 5)))
    random = np.random.default_rng(0)
    noticed = 0
    for count in (1, 3, 10, 30, 100, 300, 1000):
        for _ in range(4):
            content = whole.copy()
            content[random.integers(48, len(content), count)] ^= 1 << random.integers(
                0, 8, count
            ).astype(np.uint8)
            try:
                report, segments = read_segments(content.tobytes(), Sampling(), transform)
                (segment,) = segments
            except InputError:
                noticed += 1
                continue
            noticed += report.damaged > 0
            if (report.frames, report.fps) == (90, 30):
                assert report.used == frame_count == len(segment.views.frames)  # type: ignore[attr-defined]
            assert report.damaged <= 0.1 * report.used
    assert noticed >= 12, noticed


@pytest.mark.parametrize(
    "name",
    ["2024-01-01T12:30:00.mp4", "concat:a|b.mp4", "-i.mp4", "100%d.mp4", "[1] *?.mp4", "file:x.mp4",
     "tab\tand\nline.mp4", "\x1b[31m.mp4", "@list.mp4"],
)  # fmt: skip
def test_names_that_mean_something_to_ffmpeg(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its relative name, in its folder and from a list."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(CLIP, tmp_path / name)
    (record,) = hiera_core.predict([Path(name)], "hiera_nano_8x32")
    assert record["status"] == "ok", record["error"]
    (record,) = hiera_core.predict(tmp_path, "hiera_nano_8x32")
    assert record["status"] == "ok"


@pytest.mark.parametrize("start", [0.5, 4.0, 7.3])
def test_edit_lists_decide_what_is_shown(start: float, tmp_path: Path) -> None:
    """`ffmpeg -ss START -i long.mp4 -c copy` stores all frames since a key frame, and an edit list
    that hides those before START."""
    write_video(tmp_path / "long.mp4", 300, gop=250)
    with (
        av.open(str(tmp_path / "long.mp4")) as source,
        av.open(str(tmp_path / "cut.mp4"), "w") as cut,
    ):
        stream = source.streams.video[0]
        copy = cut.add_stream_from_template(stream)
        offset = int(start / stream.time_base)
        source.seek(offset, stream=stream, backward=True)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts -= offset
                packet.dts -= offset
                packet.stream = copy
                cut.mux(packet)
    with av.open(str(tmp_path / "cut.mp4")) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with Video(tmp_path / "cut.mp4") as video:
        assert abs(video.duration - (10 - start)) < 0.05
        assert video.frames == len(expected)
        for frame, pixels in zip(video.read(range(video.frames)), expected, strict=True):
            assert frame.intact and np.array_equal(frame.pixels, pixels)
