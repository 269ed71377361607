"""Tests of where commands write pictures: one file for one input, or a folder."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
from PIL import Image

from hiera_core.zoo import ASSETS

from .test_animation_reader import write_animation

Command = Callable[..., tuple[int, str, str]]
SAMPLES = ASSETS / "samples"
MAE = ("-m", "mae_hiera_nano_32")
VIDEO = ("-m", "mae_hiera_nano_8x32")
PREDICT = ("-m", "hiera_nano_32")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a/x.png, b/x.png and a/clip.mp4."""
    monkeypatch.chdir(tmp_path)
    for name, sample in (("a/x.png", "three.png"), ("b/x.png", "five.png")):
        Path(name).parent.mkdir()
        shutil.copy(SAMPLES / sample, name)
    shutil.copy(SAMPLES / "moving_right.mp4", "clip.mp4")
    return tmp_path


def records(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_single_input_may_have_a_file(hiera: Command, here: Path) -> None:
    code, out, _ = hiera("mae", here / "a/x.png", *MAE, "-o", "out.png")
    assert code == 0 and records(out)[0]["files"] == ["out.png"]
    with Image.open("out.png") as picture:
        assert picture.width == 3 * 166 + 6
    assert hiera("mae", "a", *MAE, "-o", "folder_of_one.PNG")[0] == 0
    assert Path("folder_of_one.PNG").read_bytes() == Path("out.png").read_bytes()
    for name in ("movie.mp4", "sheet.png"):
        code, out, _ = hiera("mae", "clip.mp4", *VIDEO, "-o", name)
        assert code == 0 and records(out)[0]["files"] == [name]
    write_animation(Path("moving.gif"))
    assert hiera("mae", "moving.gif", *VIDEO, "-o", "animation.mp4")[0] == 0
    with av.open("movie.mp4") as container:
        assert container.streams.video[0].width == 3 * 160 + 12
    with Image.open("sheet.png") as picture:
        assert picture.height == 3 * (160 + 6 + 20) + 6
    code, out, _ = hiera("predict", "a/x.png", *PREDICT, "--save-images", "annotated.png")
    assert code == 0 and records(out)[0]["picture"] == "annotated.png"
    with Image.open("annotated.png") as picture:
        assert picture.width == 320


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mae", "a/x.png", "b/x.png", *MAE, "-o", "y.png"], "is one file, and there are several"),
        (["mae", "*/x.png", *MAE, "-o", "y.png"], "name a folder: 'y'"),
        (["mae", "@list", *MAE, "-o", "y.png"], "is one file, and there are several inputs"),
        (["predict", "a", "b", *PREDICT, "--save-images", "y.png"], "there are several inputs"),
        (["mae", "a/x.png", *MAE, "-o", "y.mp4"], "is an image, and 'y.mp4' would be a video"),
        (["mae", "a/x.png", *MAE, "-o", "y.jpg"], "end it in .png or .mp4; or, for a folder, in /"),
        (["predict", "a/x.png", *PREDICT, "--save-images", "y.mp4"], "unknown file extension"),
        (["mae", "a/x.png", *MAE, "-o", "old.png"], "exists; --overwrite replaces it"),
        (["mae", "a/x.png", *MAE, "-o", "no/y.png"], "there is no folder 'no'"),
        (["mae", "a/x.png", *MAE, "-o", "a/x.png", "--overwrite"], "is a file that is an input"),
        (["mae", "a", *MAE, "-o", "a/x.png", "--overwrite"], "is a file that is an input"),
        (["mae", "a/x.png", *MAE, "-o", ""], "the path is empty"),
        (["mae", "a/x.png", *MAE, "-o", "-"], "'-' is no file"),
        (["predict", "a/x.png", *PREDICT, "--save-images", "-"], "'-' is no file"),
    ],
)
def test_outputs_are_refused_before_work(
    hiera: Command, here: Path, arguments: list[str], message: str
) -> None:
    Path("list").write_text("a/x.png\nb/x.png\n")
    Path("old.png").write_text("old")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    code, out, err = hiera(*arguments, "--checkpoint", "there_is_none.safetensors")
    assert code == 2 and out == "" and message in err, err
    assert before == {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}


def test_a_folder_is_a_folder_whatever_its_name(hiera: Command, here: Path) -> None:
    Path("old.png").mkdir()
    for output, file in (("old.png", "old.png/x.png"), ("v1.2/", "v1.2/x.png"), ("no", "no/x.png")):
        code, out, _ = hiera("mae", "a/x.png", *MAE, "-o", output)
        assert code == 0 and records(out)[0]["files"] == [file]
        assert Path(file).is_file()


def test_folders_have_short_names_and_keep_all_results(hiera: Command, here: Path) -> None:
    code, out, _ = hiera("mae", here / "a/x.png", "b", *MAE, "-o", "out")
    assert code == 0
    assert [r["files"] for r in records(out)] == [["out/a/x.png"], ["out/b/x.png"]]
    code, out, _ = hiera("features", "b/x.png", *PREDICT, "--visualize", "drawn")
    assert code == 0 and records(out)[0]["picture"] == "drawn/x.png"
    shutil.copy("clip.mp4", "b/x.mp4")
    code, out, _ = hiera("mae", "b/x.mp4", "b/x.png", *VIDEO, "-o", "both")
    assert code == 1 and records(out)[0]["files"] == ["both/x.mp4.mp4", "both/x.mp4.png"]


@pytest.mark.parametrize("inputs", [["a", "b/x.png", "clip.mp4"], ["@list"], ["-"]])
def test_a_resumed_run_gives_the_same_names(
    hiera: Command, here: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str]
) -> None:
    """Names also depend on inputs that the first run has finished, and on those that failed."""
    Path("a/x.jpg").write_text("damaged")
    Path("list").write_text("a/x.jpg\na/x.png\nb/x.png\nclip.mp4\n")
    # Probabilities are rounded in another way in batches of another size.
    batches = ["-b", "1"]
    command = ["predict", *inputs, *PREDICT, *batches, "-o", "r.jsonl", "--save-images", "shown"]

    def run(option: str) -> tuple[dict[str, bytes], str]:
        content = io.BytesIO(Path("list").read_bytes())
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=content))
        code, _, err = hiera(*command, option)
        assert code == 1, err
        files = {str(path): path.read_bytes() for path in Path("shown").rglob("*.png")}
        return files, Path("r.jsonl").read_text()

    whole = run("--overwrite")
    assert len(whole[0]) == 2
    for count in (1, 2, 3):
        lines = whole[1].splitlines(keepends=True)[:count]
        Path("r.jsonl").rename("r.jsonl.partial")
        Path("r.jsonl.partial").write_text("".join(lines))
        for path in list(whole[0])[:2]:
            if not any(path in line for line in lines):
                Path(path).unlink()
        assert run("--resume") == whole
