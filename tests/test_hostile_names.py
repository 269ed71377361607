"""Files of any name are read by name, in their folder and from lists, and printed safely."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

import hiera_core
from hiera_cli.app import run

SAMPLES = Path(hiera_core.__file__).parent / "zoo" / "assets" / "samples"
# What FFmpeg, globs, shells, terminals and spreadsheets give a meaning to.
PARTS = (
    "%d", "%03d", "*", "?", "[1]", "{1..3}", ":", "concat:", "pipe:0", "file:", "http:", "|", ";",
    "#", "-", "--help", "@", "~", "$HOME", "`id`", "'", '"', "\\", ",", "=", "\n", "\r", "\t",
    "\x1b[31m", "\u202e", "\u2028", " ", "…", "é", "日本", "\udcff", "[bold]", "a",
)  # fmt: skip
NAMES = st.one_of(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map("".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), max_size=20),
)


def call(*arguments: str) -> tuple[int, str, str]:
    """Run a command line; return its exit code and what it wrote."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape") for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        code = run(list(arguments))
    for stream in streams:
        stream.flush()
    out, err = (s.buffer.getvalue().decode("utf-8", "surrogateescape") for s in streams)  # type: ignore[attr-defined]
    return code, out, err


@given(NAMES)
@settings(deadline=None, max_examples=12)
def test_any_name(stem: str) -> None:
    """Videos with such names are in test_video_reader.py."""
    name, model = f"{stem.lstrip('.')[:60]}x.png", "hiera_nano_32"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("in").mkdir()
        shutil.copy(SAMPLES / "three.png", Path("in") / name)
        Path("list").write_bytes(b"in/" + os.fsencode(name) + b"\0")
        code, out, err = call(
            "predict", f"in/{name}", "in", "@list", "-m", model, "-f", "jsonl", "-k", "1"
        )
        assert code == 0, (name, err)
        records = [json.loads(line) for line in out.splitlines()]
        assert [(r["status"], r["input"]) for r in records] == [("ok", f"in/{name}")] * 3
        os.chdir("in")
        code, out, err = call("predict", "-m", model, "-f", "csv", "-k", "1", "--", name)
        if not name.startswith("@") and code == 0:
            (row,) = csv.DictReader(io.StringIO(out, newline=""))
            assert row["input"] == name and row["status"] == "ok"
        code, out, err = call("predict", "-m", model, "-f", "table", ".", "no" + name)
        printed = (out + err).replace("\n", "")
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069]", printed)
