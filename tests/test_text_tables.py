"""Tests of tables and lines at the width of a terminal."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hiera_cli.text_tables import fit_table, shorten, stream_width, wrap_line

from .test_reconstruct import SAMPLES

Command = Callable[..., tuple[int, str, str]]
WIDTHS = [60, 80, 120]


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize("width", WIDTHS)
def test_models_fit_the_terminal(
    hiera: Command, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = hiera("models", "-f", "table")
    assert widest(out) <= width
    rows = out.splitlines()[:25]
    assert len({len(row.split()) for row in rows[1:7]}) == 1 and "…" not in out
    assert rows[0].startswith("name") and "top1" in rows[0]
    assert ("left out at this width" in out) == ("cached" not in rows[0])


def test_files_and_pipes_have_every_column(hiera: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert "cached" in hiera("models", "-f", "table")[1].splitlines()[0]
    monkeypatch.setenv("COLUMNS", "60")
    assert "checkpoints" in hiera("models", "-f", "csv")[1].splitlines()[0]


def test_the_width_is_that_of_the_terminal_or_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, width in (("", None), ("0", None), ("x", None), ("²", None), ("70", 70)):
        monkeypatch.setenv("COLUMNS", columns)
        assert stream_width(False) == width


@pytest.mark.skipif(sys.platform == "win32", reason="no pty")
def test_a_terminal_of_60_columns() -> None:
    import fcntl
    import struct
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    code = "from hiera_cli.app import run; run(['models'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=child, env=environment)
    os.close(child)
    text = b""
    try:
        while block := os.read(parent, 4096):
            text += block
    except OSError:  # Linux: the other end is closed
        pass
    os.close(parent)
    assert process.wait() == 0
    assert b"hiera_base_224" in text and widest(text.decode().replace("\r", "")) <= 60


def test_columns_go_in_order_and_long_cells_are_shortened() -> None:
    columns, row = ["label", "a", "b"], ["x" * 100, "12345", "[67]"]
    assert "x" * 100 in fit_table(columns, [row], None, ["a"])
    text = fit_table(columns, [row], 30, ["a"])
    assert widest(text) <= 30 and "12345" not in text and "…" in text and "[67]" in text
    assert "left out at this width: a;" in " ".join(text.split())
    text = fit_table(columns, [["é" * 90 + "end", "1", "2"]], 40)
    assert widest(text) <= 40 and "end" in text
    row = fit_table(["one", "two"], [["字" * 30, "1"]], 40).splitlines()[1]
    assert row.count("字") == 17 and "…" in row  # each takes two columns


def test_words_stay_whole() -> None:
    line = "  a line of some words, and one-that-is-longer-than-the-width"
    parts = wrap_line(line, 20, indent=4)
    assert [word for part in parts for word in part.split()] == line.split()
    assert all(len(part) <= 20 or len(part.split()) == 1 for part in parts)
    assert parts[0].startswith("  a line") and parts[1].startswith("    ")
    assert shorten("abcdefghij", 5) == "ab…ij" and shorten("abc", 3) == "abc"


@pytest.mark.parametrize("width", WIDTHS)
def test_results_of_long_names_and_labels(
    hiera: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int
) -> None:
    name = tmp_path / f"{'a very long name of a file ' * 7}.png"
    shutil.copy(SAMPLES / "cat.jpg", name)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"{i} is a label of quite a few more words" for i in range(10)))
    monkeypatch.setenv("COLUMNS", str(width))
    run = ["predict", name, SAMPLES / "moving_right.mp4", "-m"]
    _, out, _ = hiera(*run, "hiera_nano_32", "--labels", labels, "-f", "table")
    lines = out.splitlines()
    assert lines[0] == str(name)  # whole, so that it can be copied
    assert widest("\n".join(lines[1:])) <= max(width, len(str(SAMPLES)) + 30)
    assert len(re.findall(r"is a label", out)) == 5
    _, out, _ = hiera(*run, "hiera_nano_8x32", "--segments", "1", "-f", "table")
    notes = [line for line in out.splitlines() if "shorter than a clip" in line]
    assert notes and all(len(line) <= max(width, len(str(SAMPLES)) + 30) for line in notes)
