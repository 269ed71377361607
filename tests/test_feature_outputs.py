"""Tests of the outputs of `hiera features`: a single array, a single picture, unknown endings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hiera_core
from hiera_core.errors import UsageError
from hiera_core.inference import feature_formats

from .test_reconstruct import SAMPLES

Command = Callable[..., tuple[int, str, str]]
IMAGE = ["-m", "hiera_nano_32", "--dtype", "fp32"]
PHOTO = SAMPLES / "cat.jpg"


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ([], (96,)),
        (["--pool", "none"], (4, 4, 96)),
        (["--stages", "2"], (8, 8, 48)),
        (["--stages", "2", "--pool", "mean"], (48,)),
    ],
)
def test_an_array_file_holds_the_only_feature(
    tmp_path: Path, hiera: Command, options: list[str], shape: tuple[int, ...]
) -> None:
    path = tmp_path / "x.npy"
    code, out, err = hiera("features", PHOTO, *IMAGE, *options, "-o", path)
    assert code == 0 and f"features are in {path}" in err
    assert json.loads(out)["file"] == {"name": str(path)}
    array = np.load(path, allow_pickle=False)
    assert array.shape == shape and array.dtype == np.float32
    if not options:
        expected = hiera_core.features(PHOTO, "hiera_nano_32", dtype="fp32")["embedding"]
        assert np.array_equal(array, expected.numpy())
    code, _, err = hiera("features", PHOTO, *IMAGE, *options, "-o", path)
    assert code == 2 and "--overwrite" in err
    with pytest.raises(UsageError, match="plain array"):
        feature_formats.read(path)


def test_an_array_file_of_segments(tmp_path: Path, hiera: Command) -> None:
    path = tmp_path / "X.NPY"
    clip = SAMPLES / "moving_right.mp4"
    code, out, _ = hiera(
        "features", clip, "-m", "hiera_nano_8x32", "--segments", "1", "-o", path, "-f", "table"
    )
    assert code == 0 and f"-> {path}\n" in out and np.load(path).shape == (2, 96)


def test_an_array_file_of_the_sample(tmp_path: Path, hiera: Command) -> None:
    code, _, _ = hiera("features", "--stages", "3", "-o", tmp_path / "x.npy")
    assert code == 0 and np.load(tmp_path / "x.npy").shape == (4, 4, 96)
    code, _, err = hiera("features", "-o", tmp_path / "y.npy")
    assert code == 2 and "several features" in err


def test_an_input_that_fails_leaves_no_array_file(tmp_path: Path, hiera: Command) -> None:
    code, _, err = hiera("features", tmp_path / "none.png", *IMAGE, "-o", tmp_path / "x.npy")
    assert code == 1 and "no such file" in err and "features are in" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cat.jpg", "five.png", "-o", "x.npy"], "there are several inputs"),
        (["samples", "-o", "x.npy"], "there are several inputs"),
        (["*.png", "-o", "x.npy"], "there are several inputs"),
        (["@list.txt", "-o", "x.npy"], "there are several inputs"),
        (["-", "-o", "x.npy"], "there are several inputs"),
        (["x.tar", "-o", "x.npy"], "there are several inputs"),
        (["cat.jpg", "--stages", "1,2", "-o", "x.npy"], "there are several features"),
        (["cat.jpg", "--return-intermediates", "-o", "x.npy"], "there are several features"),
        (["cat.jpg", "--attention", "1", "-o", "x.npy"], ".npz, .safetensors or .parquet"),
        (["cat.jpg", "--resume", "-o", "x.npy"], "needs -o with a folder"),
        (["cat.jpg", "--save-as", "npz", "-o", "x.npy"], "'x.npy' is not a npz file"),
        (["cat.jpg", "--save-as", "npz", "-o", "x.parquet"], "name a folder"),
        (["cat.jpg", "-o", "x.pt"], ".safetensors, .npz, .parquet, .npy"),
        (["cat.jpg", "-o", "x.csv"], ".safetensors, .npz, .parquet, .npy"),
        (["cat.jpg", "-o", "x.jpg"], ".safetensors, .npz, .parquet, .npy"),
        (["cat.jpg", "five.png", "--visualize", "x.png"], "there are several inputs"),
        (["samples", "--visualize", "x.png"], "there are several inputs"),
        (["cat.jpg", "--visualize", "x.jpg"], "end it in .png"),
        (["cat.jpg", "--visualize", "x.pdf"], "end it in .png"),
        (["cat.jpg", "--visualize", "no/x.png"], "no folder"),
        (["five.png", "--visualize", "five.png"], "would replace the input"),
        (["five.png", "--visualize", "five.png", "--overwrite"], "would replace the input"),
    ],
)
def test_what_cannot_be_one_file_is_refused(
    tmp_path: Path,
    hiera: Command,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cat.jpg", "five.png"):
        shutil.copy(SAMPLES / name, name)
    shutil.copytree(SAMPLES, "samples")
    Path("list.txt").write_text("cat.jpg\n")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    code, out, err = hiera("features", *arguments, *IMAGE)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out, err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_picture_of_one_input(tmp_path: Path, hiera: Command) -> None:
    """It is the picture that is written to a folder."""
    path = tmp_path / "x.png"
    code, out, err = hiera("features", PHOTO, *IMAGE, "--visualize", path)
    assert code == 0, err
    assert json.loads(out)["picture"] == str(path)
    hiera("features", PHOTO, *IMAGE, "--visualize", tmp_path / "folder")
    (other,) = (tmp_path / "folder").rglob("*.png")
    assert path.read_bytes() == other.read_bytes()
    code, _, err = hiera("features", PHOTO, *IMAGE, "--visualize", path)
    assert code == 2 and "--overwrite" in err
    code, _, _ = hiera("features", PHOTO, *IMAGE, "--visualize", path, "--overwrite")
    with Image.open(path) as picture:
        assert code == 0 and picture.width > 160


def test_folders_with_endings_stay_folders(tmp_path: Path, hiera: Command) -> None:
    for name in ("run.v2", "x.npy", "y.png"):
        (tmp_path / name).mkdir()
    for option, name in (("-o", "run.v2"), ("-o", "x.npy"), ("--visualize", "y.png")):
        code, _, err = hiera(
            "features", PHOTO, SAMPLES / "five.png", *IMAGE, option, tmp_path / name
        )
        assert code == 0 and any((tmp_path / name).iterdir()), err
    options = ["-o", tmp_path / "new.v2", "--save-as", "npz"]
    assert hiera("features", PHOTO, *IMAGE, *options)[0] == 0 and (tmp_path / "new.v2").is_dir()
