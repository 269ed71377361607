"""Tests of atomic files and folders: permissions, failing systems, leftovers, links, names."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hiera_core.atomic import (
    TEMPORARY,
    atomic_destination,
    atomic_file,
    replacing,
    unfinished,
)
from hiera_core.errors import OutputError
from hiera_core.weights import files as weight_files


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def write(path: Path, text: str = "new") -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def write_folder(path: Path, text: str = "new") -> None:
    with atomic_destination(path, is_folder=True) as folder:
        (folder / "weights").write_text(text)


# Permissions --------------------------------------------------------------------------------------


def test_new_files_have_the_permissions_of_the_umask(tmp_path: Path, umask: None) -> None:
    write(tmp_path / "file")
    write_folder(tmp_path / "folder")
    assert mode_of(tmp_path / "file") == 0o640
    assert mode_of(tmp_path / "folder") == 0o750
    assert mode_of(tmp_path / "folder/weights") == 0o640


def test_replaced_files_keep_their_permissions(tmp_path: Path, umask: None) -> None:
    for mode in (0o600, 0o444, 0o664):
        (tmp_path / "file").unlink(missing_ok=True)
        (tmp_path / "file").write_text("old")
        (tmp_path / "file").chmod(mode)
        with atomic_file(tmp_path / "file") as temporary:
            assert mode_of(temporary) & 0o077 <= mode & 0o077, "it is private from the beginning"
            temporary.write_text("new")
        assert mode_of(tmp_path / "file") == mode
    (tmp_path / "folder").mkdir(mode=0o700)
    write_folder(tmp_path / "folder")
    assert mode_of(tmp_path / "folder") == 0o700


def test_the_umask_of_the_process_does_not_change(tmp_path: Path, umask: None) -> None:
    """A thread that creates files meanwhile gets the permissions that it asks for."""
    is_done, modes = threading.Event(), set()

    def create() -> None:
        (tmp_path / "others").mkdir()
        for number in range(100_000):
            if is_done.is_set():
                return
            path = tmp_path / f"others/{number}"
            path.touch()
            modes.add(mode_of(path))
            path.unlink()

    thread = threading.Thread(target=create)
    thread.start()
    for number in range(50):
        write(tmp_path / f"{number}")
    write_folder(tmp_path / "folder")
    is_done.set()
    thread.join()
    assert modes == {0o640}


# A system that fails ------------------------------------------------------------------------------


def fail_nth(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, error: int
) -> Callable[[], bool]:
    """Make the nth call of a function of `os` fail. Return whether it has been reached."""
    real, calls = getattr(os, name), 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(error, os.strerror(error))
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, call)
    return lambda: calls >= number


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", ["open", "fsync", "replace", "rename", "mkdir", "chmod"])
@pytest.mark.parametrize("kind", ["file", "folder", "files"])
def test_every_failing_call_leaves_the_old_or_the_new_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, error: int
) -> None:
    """Each call fails in turn: what is there is complete, and nothing else is left."""
    for number in range(1, 20):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        dest = folder / "dest"
        if kind == "folder":
            write_folder(dest, "old")
        elif kind == "file":
            write(dest, "old")
        else:
            dest.write_text("old")
            (folder / "dest.data").write_text("old")
        with monkeypatch.context() as patch:
            reached = fail_nth(patch, name, number, error)
            try:
                if kind == "folder":
                    write_folder(dest)
                elif kind == "file":
                    write(dest)
                else:
                    with atomic_destination(dest, is_folder=False) as stage:
                        (stage / "dest").write_text("new")
                        (stage / "dest.data").write_text("new")
            except OutputError as failure:
                assert str(dest) in str(failure) and os.strerror(error) in str(failure)
        files = [dest / "weights"] if kind == "folder" else [dest]
        files += [folder / "dest.data"] if kind == "files" else []
        assert len({file.read_text() for file in files}) == 1, "a mixture of old and new"
        found = names_in(folder)
        if name == "open":  # a folder that cannot be opened cannot be removed now, but later
            found = [entry for entry in found if not TEMPORARY.fullmatch(entry)]
        assert found == ["dest"] + ["dest.data"] * (kind == "files")
        if not reached():
            break
    else:
        pytest.fail("there is no end to these calls")


@pytest.mark.parametrize("name", ["unlink", "close"])
def test_an_error_of_cleaning_up_does_not_replace_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = getattr(os, name)

    def fail(*arguments: Any, **options: Any) -> None:
        if name == "close":
            real(*arguments)
        raise OSError(errno.EIO, "the disk is broken")

    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "file"):
        monkeypatch.setattr(os, name, fail)
        raise ZeroDivisionError
    monkeypatch.undo()
    assert not (tmp_path / "file").exists()


def test_a_folder_that_cannot_be_synced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def sync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "a folder")
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new"


def test_names_that_are_too_long_are_one_error(tmp_path: Path) -> None:
    for name in ("x" * 300, "é" * 200):
        with pytest.raises(OutputError, match="cannot be written"):
            write(tmp_path / name)
    assert names_in(tmp_path) == []


def test_a_link_is_replaced_and_its_target_is_kept(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("old")
    (tmp_path / "link").symlink_to("blob")
    write(tmp_path / "link")
    assert (tmp_path / "blob").read_text() == "old"
    assert (tmp_path / "link").read_text() == "new" and not (tmp_path / "link").is_symlink()


# Leftovers of killed processes --------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from hiera_core.atomic import atomic_destination, atomic_file
dest = Path(sys.argv[1])
block = atomic_file(dest) if sys.argv[2] == "file" else atomic_destination(dest, is_folder=True)
with block:
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_are_removed_only_after_their_process(tmp_path: Path, kind: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "other"), kind], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    (left,) = names_in(tmp_path)
    assert TEMPORARY.fullmatch(left)
    long_ago = time.time() - 3600
    os.utime(tmp_path / left, (long_ago, long_ago))
    (tmp_path / ".hiera-0123456789abcde").write_text("not a name of ours")
    write(tmp_path / "file")
    assert left in names_in(tmp_path), "its process is still alive"
    process.kill()
    process.communicate()
    replacing._cleared.clear()  # as another process
    write(tmp_path / "file")
    assert names_in(tmp_path) == [".hiera-0123456789abcde", "file"]


def test_young_leftovers_are_kept(tmp_path: Path) -> None:
    left = tmp_path / f".hiera-{'0' * 16}"
    left.touch()
    write(tmp_path / "file")
    assert left.exists()


def test_what_a_killed_process_was_replacing_comes_back(tmp_path: Path) -> None:
    """A process was killed between moving the old folder away and moving the new one in."""
    stage = tmp_path / f".hiera-{'0' * 16}"
    (stage / "old/model").mkdir(parents=True)
    (stage / "old/model/weights").write_text("precious")
    (stage / "new").mkdir()
    long_ago = time.time() - 3600
    os.utime(stage, (long_ago, long_ago))
    write(tmp_path / "file")
    assert names_in(tmp_path) == ["file", "model"]
    assert (tmp_path / "model/weights").read_text() == "precious"


def left_behind(folder: Path, **old_and_new: dict[str, str]) -> Path:
    """Create a stale temporary folder with the given files in its folders `old` and `new`."""
    stage = folder / f".hiera-{'0' * 16}"
    for name, files in old_and_new.items():
        (stage / name).mkdir(parents=True)
        for file, text in files.items():
            (stage / name / file).write_text(text)
    os.utime(stage, (1, 1))
    return stage


def test_a_group_of_files_that_was_half_replaced_is_completed(tmp_path: Path) -> None:
    """Both files were moved away, and only one of the new ones was in place."""
    left_behind(tmp_path, old={"m.data": "old", "m": "old"}, new={"m": "new"})
    (tmp_path / "m.data").write_text("new")
    write(tmp_path / "file")
    assert names_in(tmp_path) == ["file", "m", "m.data"]
    assert (tmp_path / "m").read_text() == (tmp_path / "m.data").read_text() == "new"


def test_a_group_of_files_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    left_behind(tmp_path, old={"m.data": "old"}, new={"m": "new", "m.data": "new"})
    (tmp_path / "m").write_text("old")
    write(tmp_path / "file")
    assert names_in(tmp_path) == ["file", "m", "m.data"]
    assert (tmp_path / "m").read_text() == (tmp_path / "m.data").read_text() == "old"


@pytest.mark.parametrize("link", ["old", "new", "stage", "none"])
def test_a_forged_leftover_neither_takes_nor_replaces_files(tmp_path: Path, link: str) -> None:
    """Somebody has sent a folder with what looks like a leftover in it."""
    home, sent = tmp_path / "home", tmp_path / "sent"
    home.mkdir()
    sent.mkdir()
    for name in ("thesis", "results"):
        (home / name).write_text("precious")
    (sent / "results").write_text("precious")
    stage = sent / f".hiera-{'0' * 16}"
    if link == "stage":
        (tmp_path / "other/old").mkdir(parents=True)
        (tmp_path / "other/old/thesis").write_text("precious")
        stage.symlink_to(tmp_path / "other")
        os.utime(stage, (1, 1), follow_symlinks=False)
    elif link == "none":
        left_behind(sent, old={"results": "forged", "x": ""})
    else:
        left_behind(sent, **({"new": {}} if link == "old" else {"old": {"thesis": "", "y": ""}}))
        (stage / link).symlink_to(home)
        os.utime(stage, (1, 1))
    write(sent / "file")
    assert names_in(home) == ["results", "thesis"]
    assert (sent / "results").read_text() == (home / "thesis").read_text() == "precious"
    assert link != "stage" or (tmp_path / "other/old/thesis").exists()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interruption_between_renames_brings_the_old_files_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, when: str
) -> None:
    for name in ("dest", "dest.data"):
        (tmp_path / name).write_text("old")
    real, calls = os.rename, 0

    def rename(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls != number:
            return real(*arguments)
        if when == "after":
            real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", rename)
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_destination(tmp_path / "dest", is_folder=False) as stage,
    ):
        for name in ("dest", "dest.data"):
            (stage / name).write_text("new")
    assert names_in(tmp_path) == ["dest", "dest.data"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}


# Writes in progress -------------------------------------------------------------------------------


def test_a_signal_waits_for_the_end_of_a_write(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        with atomic_file(tmp_path / "file") as temporary:
            unfinished.raise_or_defer(ZeroDivisionError())
            assert unfinished.being_finished() == [tmp_path / "file"]
            temporary.write_text("new")
        pytest.fail("the exception is lost")
    assert (tmp_path / "file").read_text() == "new"
    with pytest.raises(ZeroDivisionError):
        unfinished.raise_or_defer(ZeroDivisionError())


def test_undoing_removes_temporary_files_and_folders(tmp_path: Path) -> None:
    """It is called from another thread, just before the process ends."""
    script = (
        "import os, sys, threading\n"
        "from pathlib import Path\n"
        "from hiera_core.atomic import atomic_destination, atomic_file, unfinished\n"
        "folder = Path(sys.argv[1])\n"
        "def end():\n"
        "    undone = unfinished.undo_all()\n"
        "    print(*(path.name for path in undone), flush=True)\n"
        "    os._exit(3)\n"
        "with atomic_file(folder / 'a') as a, atomic_destination(folder / 'b', is_folder=True):\n"
        "    a.write_text('half')\n"
        "    threading.Thread(target=end).start()\n"
        "    threading.Event().wait(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "a b\n", "")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("patience", [0.0, 10.0])
def test_undoing_keeps_the_only_copy_of_a_file(tmp_path: Path, patience: float) -> None:
    """In time, or while a rename does not end, as on a network that has stopped to answer."""
    script = (
        "import os, sys, threading\n"
        "from pathlib import Path\n"
        "from hiera_core.atomic import unfinished\n"
        "stage, patience = Path(sys.argv[1]), float(sys.argv[2])\n"
        "def end():\n"
        "    unfinished.undo_all(patience)\n"
        "    os._exit(3)\n"
        "with unfinished.temporary(stage, stage.parent / 'model'):\n"
        "    thread = threading.Thread(target=end)\n"
        "    if patience:\n"
        "        thread.start()\n"
        "        thread.join()\n"
        "    with unfinished.renaming():\n"
        "        thread.start()\n"
        "        thread.join()\n"
    )
    stage = left_behind(tmp_path, old={"model": "precious"} if patience else {}, new={"x": "new"})
    subprocess.run([sys.executable, "-c", script, str(stage), str(patience)], timeout=60)
    assert stage.exists()


def test_a_write_is_being_finished_before_it_has_a_file(tmp_path: Path) -> None:
    """For example while features are put together, which can take longer than a signal waits."""
    with unfinished.finish_first(tmp_path / "shard"):
        assert unfinished.being_finished() == [tmp_path / "shard"]
        with atomic_file(tmp_path / "shard"):
            assert unfinished.being_finished() == [tmp_path / "shard"]
    assert unfinished.being_finished() == []


def test_every_format_is_written_with_the_permissions_of_the_umask(tmp_path: Path) -> None:
    """The writer of safetensors makes its files private."""
    (tmp_path / "plain").touch()
    weight_files.write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    weight_files.write_pickle(tmp_path / "a.pth", {"x": torch.ones(2)})
    weight_files.write_json(tmp_path / "a.json", {})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
