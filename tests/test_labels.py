"""Tests of class names: files that are not text, or never end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hiera_core.zoo import labels

Command = Callable[..., tuple[int, str, str]]


def test_labels_have_one_name_on_each_line(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("tench\ngreat white shark\nKäse\n", encoding="utf-8")
    assert labels.read_labels(tmp_path / "names.txt") == ["tench", "great white shark", "Käse"]


@pytest.mark.parametrize(
    "kind",
    ["missing", "folder", "pipe", "/dev/full", "/dev/zero", "binary", "nul", "long", "large"],
)
def test_labels_that_cannot_be_read(
    kind: str, tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: str | Path = tmp_path / "labels"
    if kind == "folder":
        Path(path).mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "binary":
        Path(path).write_bytes(bytes(range(256)))
    elif kind == "nul":
        Path(path).write_bytes(b"a\0b\n")
    elif kind == "large":
        monkeypatch.setattr(labels, "MAX_LABELS_BYTES", 10)
        Path(path).write_text("eleven bytes")
    elif kind != "missing":
        path = "x" * 5000 if kind == "long" else kind
    code, _, err = hiera("predict", "x.jpg", "-m", "hiera_nano_32", "--labels", path)
    assert code == 2 and err.count("\n") == 1 and "cannot be read" in err, err
