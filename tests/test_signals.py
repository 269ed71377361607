"""Tests of signals: finished results stay, writes are finished or undone, one line, exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .fork_server import ForkedProcess, ForkServer
from .test_feature_store import make_picture

StartBusy = Callable[[Path, str], ForkedProcess]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals differ")

# A command whose main thread is busy in one of several ways, until it gets a signal.
BUSY = """
import sys, time
from pathlib import Path
from hiera_cli import app, signals
from hiera_core.atomic import atomic_destination, atomic_file

dest, what = Path(sys.argv[1]), sys.argv[2]
signals.GRACE_S, signals.WRITE_GRACE_S = 1.0, 4.0

def work():
    print("ready", flush=True)
    if what == "stuck":  # as in a long forward pass, which exceptions do not interrupt
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                time.sleep(60)
            except BaseException:
                pass
    if what == "convert":
        with atomic_destination(dest, is_folder=True) as folder:
            (folder / "weights").write_text("half")
            time.sleep(60)
    with atomic_file(dest) as temporary:
        temporary.write_text("half")
        time.sleep(2.5 if what == "slow" else 60)
        temporary.write_text("whole")

def run(arguments):
    try:
        return work()
    except BaseException as error:
        return app.exit_codes.exit_code_of(error)

app.run = run
app.main()
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start a Python process that does not ignore signals, as a background job of a shell does."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    return process


@pytest.fixture
def start_busy(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> StartBusy:
    """Return a function that starts a command which is busy, with its file and with what."""
    streams = tmp_path_factory.mktemp("streams")

    def start_busy(dest: Path, what: str) -> ForkedProcess:
        process = fork_server.start(streams, dest, what, code=BUSY)
        while process.text("out") != "ready\n":
            assert process.poll() is None, process.text("err")
            time.sleep(0.01)
        time.sleep(0.3)
        return process

    return start_busy


def end(process: subprocess.Popen[str] | ForkedProcess) -> list[str]:
    """Return the lines on stderr of a process that ends."""
    try:
        return process.communicate(timeout=30)[1].splitlines()
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("signum", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_slow_write_is_finished(
    start_busy: StartBusy, tmp_path: Path, signum: int, code: int, word: str
) -> None:
    process = start_busy(tmp_path / "out", "slow")
    process.send_signal(signum)
    lines = end(process)
    assert process.returncode == code
    assert lines[0].startswith(f"hiera: {word}: finishing {tmp_path / 'out'} first, for at most")
    assert lines[1:] == [f"hiera: {word}"]
    assert (tmp_path / "out").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("again", [False, True], ids=["time limit", "second signal"])
def test_an_endless_write_is_undone(start_busy: StartBusy, tmp_path: Path, again: bool) -> None:
    (tmp_path / "out").write_text("old")
    process = start_busy(tmp_path / "out", "endless")
    process.send_signal(signal.SIGINT)
    if again:
        time.sleep(0.8)
        process.send_signal(signal.SIGINT)
    lines = end(process)
    assert process.returncode == 130
    assert lines[-1] == f"hiera: interrupted; {tmp_path / 'out'} was not written"
    assert len(lines) == (1 if again else 2)
    assert (tmp_path / "out").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_conversion_is_undone_at_once(start_busy: StartBusy, tmp_path: Path) -> None:
    process = start_busy(tmp_path / "out", "convert")
    process.send_signal(signal.SIGTERM)
    assert end(process) == ["hiera: terminated"]
    assert process.returncode == 143 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("signum", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "terminated"),
    ],
)
def test_a_stuck_process_ends(
    start_busy: StartBusy, tmp_path: Path, signum: int, code: int, word: str
) -> None:
    process = start_busy(tmp_path / "out", "stuck")
    process.send_signal(signum)
    assert end(process) == [f"hiera: {word}"]
    assert process.returncode == code


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("name", ["out.npz", "out"])
def test_features_are_whole_or_can_be_resumed(
    fork_server: ForkServer, tmp_path: Path, signum: int, name: str
) -> None:
    output = tmp_path / "streams"
    output.mkdir()
    make_picture(tmp_path / "x.png", 0)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/x.png\n" * 100_000)
    process = fork_server.start(
        output, "features", f"@{tmp_path}/list.txt", "-m", "hiera_nano_32",
        "-o", tmp_path / name, "-b", "4", "--dtype", "fp32",
    )  # fmt: skip
    while process.text("out").count("\n") < 8:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signum)
    (line,) = process.communicate(30)[1].splitlines()
    assert process.returncode == (-signum if signum == signal.SIGHUP else 128 + signum)
    if name == "out":
        assert line.endswith("out; --resume continues")
        assert [p.name for p in (tmp_path / name).iterdir()] == ["image-00000.safetensors"]
    else:
        assert "out.npz is not written after" in line
        assert not (tmp_path / name).exists()
    left = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert left == []


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_signal_while_python_imports_is_one_line(number: signal.Signals, words: str) -> None:
    """The handlers of the entry point are there before the modules of the command line."""
    program = (
        "import builtins, os, signal, sys\n"
        "from hiera_cli.__main__ import main\n"
        "original = builtins.__import__\n"
        "def stopping(name, *rest, **more):\n"
        "    if name == 'app':\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "    return original(name, *rest, **more)\n"
        "builtins.__import__ = stopping\n"
        "main()"
    )
    process = start("-c", program)
    assert end(process) == [f"hiera: {words}"]
    assert process.returncode == 128 + number
