"""Tests of `--decoder torchcodec`: the same frames as PyAV, by their numbers."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hiera_core
from hiera_core.data.decoders.torchcodec_video import TorchcodecVideo, check_torchcodec
from hiera_core.data.video_files.animation_reader import Animation, open_video
from hiera_core.data.video_files.video_reader import Video
from hiera_core.errors import InputError, UsageError

from .test_video_reader import write_video

Hiera = Callable[..., tuple[int, str, str]]
CLIP = Path(hiera_core.__file__).parent / "zoo" / "assets" / "samples" / "moving_right.mp4"
VARYING = [0.0, 0.04, 0.1, 0.11, 0.2, 0.35, 0.36, 0.5, 0.6, 0.61, 0.62, 0.8]


def can_be_loaded() -> bool:
    try:
        check_torchcodec()
    except UsageError:
        return False
    return True


needs_torchcodec = pytest.mark.skipif(
    not can_be_loaded(), reason="torchcodec cannot be loaded: it, or FFmpeg, is not installed"
)


def frames_of(video: Any, indices: Sequence[int]) -> list[np.ndarray]:
    with video:
        return [frame.pixels for frame in video.read(indices)]


class Stand:
    """What torchcodec's decoder does, by PyAV: the frame that is shown at each time."""

    def __init__(self, path: Path) -> None:
        self.asked: list[float] = []
        with Video(path) as video:
            self.times = [i / video.fps for i in range(video.frames)]
            self.start = video._timeline.start
            self.frames = np.stack([f.pixels for f in video.read(range(video.frames))])
            end = self.start + video.duration
        self.metadata = SimpleNamespace(begin_stream_seconds=self.start, end_stream_seconds=end)

    def get_frames_played_at(self, seconds: Sequence[float]) -> Any:
        import torch

        self.asked += seconds
        assert all(self.metadata.begin_stream_seconds <= s for s in seconds)
        assert all(s < self.metadata.end_stream_seconds for s in seconds)
        rows = [int(np.searchsorted(self.times, s - self.start, "right")) - 1 for s in seconds]
        return SimpleNamespace(data=torch.from_numpy(self.frames[rows]))


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Stand]:
    """Return a video, and the stand-in that decodes it."""
    path = write_video(tmp_path / "x.mp4", frames=40, fps=Fraction(30000, 1001))
    made = Stand(path)
    monkeypatch.setattr(TorchcodecVideo, "_open_decoder", lambda self: made)
    return path, made


# Without torchcodec -------------------------------------------------------------------------------


def test_frame_numbers_become_times(stand: tuple[Path, Stand]) -> None:
    """Each frame is asked for by a time at which it is shown, in small numbers at a time."""
    path, made = stand
    indices = [0, 1, 2, 3, 10, 10, 25, 38, 39]
    found = frames_of(TorchcodecVideo(path), indices)
    assert all(
        np.array_equal(a, b) for a, b in zip(found, frames_of(Video(path), indices), strict=True)
    )
    assert len(made.asked) == len(indices) + 1  # the first one is compared


def test_a_decoder_that_shows_other_frames_is_not_used(stand: tuple[Path, Stand]) -> None:
    path, made = stand
    made.frames = 255 - made.frames
    assert np.array_equal(
        np.stack(frames_of(TorchcodecVideo(path), [5, 9])), np.stack(frames_of(Video(path), [5, 9]))
    )
    made.frames = made.frames[:, ::-1, ::-1].transpose(0, 2, 1, 3)  # rotated
    assert frames_of(TorchcodecVideo(path), [5])[0].shape == (96, 128, 3)


def test_pyav_reads_on_where_the_decoder_fails(
    stand: tuple[Path, Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = stand
    real, calls = made.get_frames_played_at, list[int]()

    def fail_later(seconds: Sequence[float]) -> Any:
        calls.append(len(seconds))
        if len(calls) > 2:
            raise RuntimeError("Could not push packet to decoder")
        return real(seconds)

    monkeypatch.setattr(made, "get_frames_played_at", fail_later)
    indices = list(range(30))
    found = frames_of(TorchcodecVideo(path), indices)
    assert calls == [1, 8, 8]
    assert np.array_equal(np.stack(found), np.stack(frames_of(Video(path), indices)))


def test_videos_that_need_pyav_are_read_by_it(tmp_path: Path) -> None:
    """Frames without time stamps, and files that are cut off."""
    raw = write_video(tmp_path / "x.h264", frames=12, codec="libx264")
    assert TorchcodecVideo(raw)._decoder is None
    whole = write_video(tmp_path / "x.mkv", frames=60)
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    video = TorchcodecVideo(tmp_path / "cut.mkv")
    assert video._decoder is None
    with pytest.raises(InputError, match="damaged or lost"), video:
        list(video.read([0]))


def test_animations_are_opened_as_usual(tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in (0, 90, 180)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    with open_video(tmp_path / "x.gif", reader=TorchcodecVideo) as video:
        assert isinstance(video, Animation)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("No module named 'torchcodec'"), "not installed"),
        (RuntimeError("Could not load libtorchcodec\nlibavutil.so.59"), "cannot be loaded"),
        (OSError("libavutil.so.59: cannot open shared object file"), "cannot be loaded"),
    ],
)
def test_what_is_missing_is_one_line(
    error: Exception, message: str, hiera: Hiera, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def fail(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "torchcodec":
            raise error
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    code, out, err = hiera("predict", CLIP, "-m", "hiera_nano_8x32", "--decoder", "torchcodec")
    assert (code, out) == (2, "") and message in err and "Traceback" not in err
    assert "torchcodec" in err


# With torchcodec ----------------------------------------------------------------------------------


@needs_torchcodec
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fps": Fraction(30000, 1001), "gop": 12},
        {"times": VARYING, "frames": len(VARYING)},
        {"codec": "mpeg4", "gop": 5},
        {"rotation": 90},
    ],
)
def test_frames_are_those_of_pyav(options: dict[str, Any], tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", **{"frames": 60, **options})
    with Video(path) as video:
        indices = sorted({*range(0, video.frames, 7), video.frames - 1})
    found, expected = frames_of(TorchcodecVideo(path), indices), frames_of(Video(path), indices)
    every = list(range(video.frames))
    around = dict(zip(every, frames_of(Video(path), every), strict=True))
    for index, one, other in zip(indices, found, expected, strict=True):
        assert one.shape == other.shape
        differences = {i: np.abs(one.astype(int) - frame).mean() for i, frame in around.items()}
        assert differences[index] < 4 and differences[index] == min(differences.values())


@needs_torchcodec
def test_a_video_has_the_classes_that_pyav_gives(hiera: Hiera) -> None:
    run = ("predict", CLIP, "-m", "hiera_nano_8x32", "-k", "1", "-f", "csv", "--dtype", "fp32")
    first, second = hiera(*run), hiera(*run, "--decoder", "torchcodec")
    assert first[0] == second[0] == 0
    assert first[1].splitlines()[1].split(",")[:6] == second[1].splitlines()[1].split(",")[:6]
