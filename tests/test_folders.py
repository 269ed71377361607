"""Every file of a folder is an input or is counted; links are followed, and loops are noticed."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hiera_core.data import datasets, folders

Command = Callable[..., tuple[int, str, str]]

KINDS = (
    "photo.png", "photo.JPG", "photo.jpeg", "phone.HEIC", "canon.cr2", "scan.tiff", "old.tga",
    "vector.svg", "page.pdf", "notes.txt", "labels.csv", "data.json", "README", "archive.zip",
    "shard.tar", "film.mts", "film.mp4", "film.mpeg.part", "clip.webm", "song.mp3", "song.wav",
    "model.pth", "weights.safetensors", ".hidden.png", ".DS_Store", "Thumbs.db", "with.dots.png",
    "no ending.", "UPPER.PNG", "empty.png",
)  # fmt: skip


@pytest.mark.parametrize("recursive", [False, True])
def test_every_file_is_accounted_for(
    recursive: bool, tmp_path: Path, pictures: Path, hiera: Command
) -> None:
    photo = (pictures / "rocket.png").read_bytes()
    for folder in (tmp_path, tmp_path / "inner"):
        folder.mkdir(exist_ok=True)
        for name in KINDS:
            (folder / name).write_bytes(photo if name[0] != "e" else b"")
    options = ["-r"] if recursive else []
    code, out, err = hiera("predict", tmp_path, "-m", "hiera_nano_32", *options, "-f", "jsonl")
    assert code == 1  # the empty one
    records = [json.loads(line) for line in out.splitlines()]
    assert len({record["input"] for record in records}) == len(records)
    summary = next(line for line in err.splitlines() if "passed over" in line)
    passed_over = summary.partition("passed over: ")[2].split(", ")
    counted = sum(int(entry.split()[0]) for entry in passed_over)
    seen = len(KINDS) * (2 if recursive else 1)
    assert (
        len(records) + counted
        == seen
        == sum(
            path.is_file() for path in (tmp_path.rglob("*") if recursive else tmp_path.iterdir())
        )
    )
    assert f"{2 if recursive else 1} .svg" in passed_over and "hidden" in summary
    assert any(record["input"].endswith("phone.HEIC") for record in records)


def find_counts(folder: Path, *options: str) -> int:
    """Return how many files `find` sees."""
    command = ["find", folder, *options, "(", "-type", "f", "-o", "-type", "l", ")", "-print0"]
    return subprocess.run(command, capture_output=True, check=True).stdout.count(b"\0")


@pytest.mark.skipif(shutil.which("find") is None, reason="there is no program find")
@pytest.mark.parametrize("recursive", [False, True])
def test_the_counts_add_up_to_what_find_sees(
    recursive: bool, tmp_path: Path, pictures: Path, hiera: Command
) -> None:
    """With files of each kind, hidden folders, odd names and links."""
    photo = (pictures / "rocket.png").read_bytes()
    names = (*KINDS, "new\nline.png", "100%d.png", "a:b.png", "-x.png", "[1].png", "trailing.png.")
    for folder in (".", "inner", "inner/deeper", ".git/objects", "inner/.cache"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (tmp_path / folder / name).write_bytes(photo if name[0] != "e" else b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.png").symlink_to("photo.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    options = ["-r"] if recursive else []
    code, out, err = hiera("predict", tmp_path, "-m", "hiera_nano_32", *options, "-f", "jsonl")
    assert code == 1
    records = [json.loads(line) for line in out.splitlines()]
    failed = sum(record["status"] == "error" for record in records)
    summary = next(line for line in err.splitlines() if "passed over" in line)
    assert summary.startswith(f"hiera: {len(records) - failed} ok, {failed} failed, passed over: ")
    counts = summary.partition("passed over: ")[2].split(", ")
    left_out = sum(int(count.split()[0]) for count in counts)
    seen = find_counts(tmp_path, *([] if recursive else ["-maxdepth", "1"]))
    assert len(records) + left_out == seen > (150 if recursive else 30)


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "real" / "cat").mkdir(parents=True)
    for name in ("real/cat/a.png", "real/b.png"):
        (tmp_path / name).touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "real" / "cat", target_is_directory=True)
    (tmp_path / "data" / "c.png").symlink_to(tmp_path / "real" / "b.png")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data" / "loop").symlink_to("loop")
    (tmp_path / "data" / "gone.png").symlink_to("nowhere")
    found = [
        str(p.relative_to(tmp_path)) for p in folders.find_files(tmp_path / "data", recursive=True)
    ]
    assert found == ["data/c.png", "data/gone.png", "data/dog/a.png"]
    samples = datasets.open_dataset(tmp_path / "data", labelled=False)
    assert len(samples) == 3  # MAE training sees the files behind links, too
    assert datasets.open_dataset(tmp_path / "data").classes == ["dog"]


def test_folders_that_many_links_lead_to_are_entered_once(tmp_path: Path) -> None:
    """Each of these folders is linked from the one before by two names: 2 ** 16 paths to a file."""
    for number in range(16):
        (tmp_path / f"d{number}").mkdir()
    for number in range(15):
        for name in "ab":
            (tmp_path / f"d{number}" / name).symlink_to(f"../d{number + 1}")
    (tmp_path / "d15" / "x.png").touch()
    found = list(folders.find_files(tmp_path / "d0", recursive=True))
    assert found == [tmp_path / "d0" / Path(*"a" * 15) / "x.png"]


def test_folders_may_be_nested_deeply(tmp_path: Path) -> None:
    """Without a call for each level, of which Python allows a thousand."""
    deep = tmp_path / Path(*"x" * 150)
    deep.mkdir(parents=True)
    (deep / "x.png").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        found = list(folders.find_files(tmp_path, recursive=True))
    finally:
        sys.setrecursionlimit(limit)
    assert found == [deep / "x.png"]


def test_counts_are_sorted() -> None:
    assert folders.describe(Counter({".a": 1, ".c": 3, ".b": 3})) == "3 .b, 3 .c, 1 .a"


def test_hidden_folders_are_counted_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot may hold copies of the whole disk, of which nothing is read."""
    for number in range(20):
        (tmp_path / f".snapshot/{number}").mkdir(parents=True)
        (tmp_path / f".snapshot/{number}/x.png").touch()
    for limit, expected in ((30, 15), (10_000, 20)):
        monkeypatch.setattr(folders, "MAX_HIDDEN", limit)
        passed_over: Counter[str] = Counter()
        assert not list(folders.find_files(tmp_path, recursive=True, passed_over=passed_over))
        assert passed_over == {"hidden": expected}
