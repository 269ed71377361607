"""Tests of what C libraries print: nothing of it reaches the terminal, and our messages do."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import RunProcess

# It prints to the descriptor as a C library does, and through Python.
PROGRAM = """
import os, sys, {imports}
from hiera_cli import native_output
native_output.silence()
os.write(2, b"from C\\n")
print("from Python", file=sys.stderr)
{then}
"""


def run_program(imports: str = "io", then: str = "") -> tuple[int, bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PROGRAM.format(imports=imports, then=then)],
        stderr=subprocess.PIPE,
        env=environment,
        timeout=60,
    )
    return result.returncode, result.stderr


def damaged_tiff() -> bytes:
    """A TIFF file that libtiff prints an error about."""
    file = io.BytesIO()
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(picture).save(file, "TIFF", compression="tiff_adobe_deflate")
    data = bytearray(file.getvalue())
    data[200:260] = bytes(60)
    return bytes(data)


@pytest.mark.parametrize("debug", [False, True])
def test_libraries_print_only_with_debug(
    run_process: RunProcess, small_folder: Path, tmp_path: Path, debug: bool
) -> None:
    (tmp_path / "x.tiff").write_bytes(damaged_tiff())
    options = ["--debug"] if debug else []
    result = run_process(*options, "predict", tmp_path / "x.tiff", "-m", small_folder)
    lines = result.stderr.splitlines()
    assert any(line.startswith("hiera: ") and "x.tiff" in line for line in lines)
    foreign = [line for line in lines if not line.startswith("hiera: ")]
    assert bool(foreign) == debug, foreign


def test_our_messages_and_tracebacks_remain() -> None:
    code, printed = run_program(then="raise ValueError('ours')")
    assert code == 1 and b"from C" not in printed
    assert b"from Python" in printed and b"ValueError: ours" in printed


@pytest.mark.skipif(os.name != "posix", reason="ends by a signal")
def test_crashes_are_still_reported() -> None:
    code, printed = run_program("faulthandler", "faulthandler._sigsegv()")
    assert code < 0 and b"Fatal Python error: Segmentation fault" in printed


def test_forked_children_print_their_messages() -> None:
    then = (
        "pid = os.fork()\nprint('parent' if pid else 'child', file=sys.stderr)\npid and os.wait()"
    )
    _, printed = run_program(then=then)
    assert b"child" in printed and b"parent" in printed
