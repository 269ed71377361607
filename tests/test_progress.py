"""Tests of the progress: its total, its text, and the last line of a run."""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hiera_cli.progress import InputCount, Rate
from hiera_core.data import sources

from .test_reconstruct import SAMPLES

Command = Callable[..., tuple[int, str, str]]
NANO = ["-m", "hiera_nano_32", "--dtype", "fp32"]


def test_the_text_has_a_total_and_the_time_that_is_left() -> None:
    now = [100.0]
    rate = Rate(lambda: now[0])
    assert rate.text(50, 0, None) == "50 done, 0 failed"  # 50 are those of a resumed run
    now[0] += 10
    assert rate.text(70, 1, None) == "70 done, 1 failed, 2.0/s"
    assert rate.text(70, 1, 270) == "70 of 270 done, 1 failed, 2.0/s, 0:01:40 left"
    assert rate.text(70, 1, 7_270) == "70 of 7270 done, 1 failed, 2.0/s, 1:00:00 left"
    assert rate.text(70, 1, 60) == "70 of 60 done, 1 failed, 2.0/s"  # files were added


def counted(*inputs: str, recursive: bool = False) -> int | None:
    count = InputCount(inputs, recursive)
    count.start()
    until = time.monotonic() + 10
    while count.total is None and time.monotonic() < until:
        if not all(map(sources.can_be_listed_twice, inputs)):
            return None
        time.sleep(0.01)
    return count.total


def test_inputs_are_counted_in_the_background(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.txt", "in/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("a\nb\n\nc\n")
    assert counted(str(tmp_path)) == 2
    assert counted(str(tmp_path), recursive=True) == 3
    assert counted(f"@{tmp_path}/list.txt", "x.png", "https://x/y.png") == 5
    assert counted("-") is None
    os.mkfifo(tmp_path / "pipe")
    assert counted(f"@{tmp_path}/pipe", "x.png") is None


def test_a_terminal_shows_the_total(
    hiera: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    names = ("three", "five", "eight")
    inputs = [SAMPLES / f"{name}.png" for name in names]
    list_of_many = tmp_path / "list.txt"
    list_of_many.write_text("".join(f"{path}\n" for path in inputs * 20))
    assert hiera("predict", f"@{list_of_many}", *NANO, "-o", tmp_path / "out.jsonl")[0] == 0
    text = terminal.getvalue()
    assert " of 60 done, 0 failed" in text
    assert f"60 ok, 0 failed -> {tmp_path}/out.jsonl" in text.splitlines()[-1]


def test_the_last_line_says_where_everything_is(
    hiera: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(SAMPLES / "three.png", "a.png")
    run = ["predict", "a.png", *NANO, "-o", "out.csv", "--save-images", "shown"]
    assert hiera(*run)[2] == "hiera: 1 ok, 0 failed -> out.csv; pictures are in shown\n"
    assert hiera(*run, "--overwrite", "-q")[2] == ""
    _, _, err = hiera("features", "a.png", *NANO, "-o", "f.npz", "--visualize", "maps")
    assert "pictures are in maps" in err and "features are in f.npz" in err
    _, _, err = hiera("mae", "a.png", "-m", "mae_hiera_nano_32", "-o", "mae")
    assert "pictures are in mae" in err
    assert "true mean brightness and contrast; its colours and" in err
    assert hiera("predict", "a.png", *NANO)[2] == ""
