"""Tests of locks: one process at a time writes to an output."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hiera_core.atomic import lock
from hiera_core.atomic.lock import exclusive, exclusive_folder
from hiera_core.errors import UsageError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")

HOLD = """
import sys, time
from pathlib import Path
from hiera_core.atomic.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[bytes]:
    """Start a process that holds the lock of a path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "output"
    if kind == "folder":
        path.mkdir()
    process = hold(path)
    other = f"another process is writing.*process {process.pid}"
    with pytest.raises(UsageError, match=other), exclusive(path):
        pytest.fail("the lock is held twice")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # Its lock file is still there, and holds nothing.
    with (
        exclusive(path),
        pytest.raises(UsageError, match=f"process {os.getpid()}"),
        exclusive(path),
    ):
        pytest.fail("the lock is held twice")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["output"] * (kind == "folder")


def test_a_folder_is_made_and_removed_if_it_stays_empty(tmp_path: Path) -> None:
    with exclusive_folder(tmp_path / "a/b"):
        assert (tmp_path / "a/b").is_dir()
    assert not (tmp_path / "a/b").exists()
    with exclusive_folder(tmp_path / "a/b"):
        (tmp_path / "a/b/result").touch()
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["result"]


def test_a_full_disk_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(lock.OutputError, match="No space left"), exclusive(tmp_path / "x"):
            pass
    with exclusive(tmp_path / "x"):
        pass


def test_locks_that_the_system_does_not_offer_are_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with exclusive(tmp_path / "x"):
        pass
    monkeypatch.setattr(lock, "fcntl", None)
    with exclusive(tmp_path / "x"):
        pass


def test_an_error_that_does_not_say_held_is_no_lock_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = (errno.EWOULDBLOCK, errno.EACCES)
    for number in (errno.EIO, errno.EINTR, errno.ENOLCK, errno.EBADF, *held):

        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))  # noqa: B023

        monkeypatch.setattr(lock.fcntl, "flock", fail)
        assert lock.lock_state(0) == ("held" if number in held else "unknown")


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "file", "folder", "pipe"])
def test_a_file_that_is_no_lock_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    """A folder that somebody has sent may hold anything under the name of the lock."""
    (tmp_path / "sent").mkdir()
    precious, path = tmp_path / "precious", tmp_path / "sent/.lock"
    precious.write_text("precious")
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "new")
    elif kind == "hard link":
        path.hardlink_to(precious)
    elif kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(UsageError, match="is not a lock file"), exclusive(tmp_path / "sent"):
        pytest.fail("it is locked")
    assert precious.read_text() == "precious" and not (tmp_path / "new").exists()
    assert os.path.lexists(path) and (kind != "file" or path.read_text() == "precious")
