"""What the index of an MP4 file says about its frames."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from hiera_core.data.video_files import listed_frames
from hiera_core.data.video_files.listed_frames import ListedFrames
from hiera_core.data.video_files.video_reader import Video
from hiera_core.errors import InputError

from .test_cut_videos import edit
from .test_video_reader import write_video

SIZE = (96, 64)


def listed(path: Path) -> ListedFrames:
    with av.open(str(path)) as container:
        return ListedFrames.read(container, container.streams.video[0])


@pytest.mark.parametrize("ending", ["mp4", "mov"])
def test_all_frames_are_listed(ending: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"x.{ending}", 40, size=SIZE)
    assert listed(path) == ListedFrames(shown=40, hidden=0)


def test_other_formats_list_nothing(tmp_path: Path) -> None:
    assert listed(write_video(tmp_path / "x.mkv", 4, size=SIZE)) == ListedFrames()


def test_a_varying_rate_changes_nothing(tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.08, 0.2, 0.24, 0.28, 0.5]
    assert listed(write_video(tmp_path / "x.mp4", 7, size=SIZE, times=times)).shown == 7


def test_a_file_that_is_cut_off_ends_before_its_last_frame(tmp_path: Path) -> None:
    options = {"movflags": "faststart"}
    path = write_video(tmp_path / "x.mp4", 40, size=SIZE, options=options)
    assert listed(path).in_file
    path.write_bytes(path.read_bytes()[:-1])
    assert listed(path) == ListedFrames(shown=40, hidden=0, in_file=False)


def test_frames_that_an_edit_list_hides_or_repeats(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", 60, size=SIZE, gop=60)
    found = listed(edit(path, tmp_path / "hidden.mp4", [(1000, 0.5)]))
    assert (found.shown, found.hidden) == (30, 30)
    assert listed(edit(path, tmp_path / "twice.mp4", [(1500, 0.0), (1500, 0.0)])).shown == 90


@pytest.mark.parametrize(
    "piece", [(2000, 0.0), (33, 1.9)], ids=["all frames", "one frame, and those that it depends on"]
)
def test_edits_that_repeat_a_file_endlessly_are_refused(
    piece: tuple[int, float], tmp_path: Path
) -> None:
    """A few kilobytes of edits would have a file of 60 frames decoded for hours."""
    path = write_video(tmp_path / "x.mp4", 60, size=SIZE, gop=60)
    repeated = edit(path, tmp_path / "repeated.mp4", [piece] * 100)
    with Video(repeated) as video:
        assert video.frames == (6000 if piece[1] == 0.0 else 100)
    edit(path, repeated, [piece] * 2000)
    with pytest.raises(InputError, match=r"its edit list lists 1\d\d,\d+ frames of a file with 60"):
        Video(repeated)


def test_more_frames_than_a_video_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "x.mp4", 40, size=SIZE)
    monkeypatch.setattr(listed_frames, "MAX_LISTED", 39)
    with pytest.raises(InputError, match="it lists 40 frames; export the video again"):
        Video(path)
