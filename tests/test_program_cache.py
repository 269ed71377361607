"""Tests of compiled programs on disk: which are read, which are removed, and who may write them."""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hiera_core.compiling import compiler_cache, program_cache
from hiera_core.compiling.program_cache import ProgramCache
from hiera_core.errors import UsageError

KEY = "0123456789abcdef" * 2
OTHER = "f" * 32
Hiera = Callable[..., tuple[int, str, str]]
needs_owners = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")


@pytest.fixture
def cache(tmp_path: Path) -> ProgramCache:
    return ProgramCache(tmp_path / "deep" / "compiled", limit=1000)


def content_of(cache: ProgramCache, key: str = KEY) -> bytes | None:
    path = cache.find(key)
    return None if path is None else path.read_bytes()


def test_a_program_is_found_by_its_key(cache: ProgramCache) -> None:
    assert content_of(cache) is None
    assert cache.add(KEY, b"code") == cache.find(KEY)
    assert content_of(cache) == b"code" and content_of(cache, OTHER) is None
    cache.add(KEY, b"newer code")
    assert content_of(cache) == b"newer code" and len(list(cache.folder.iterdir())) == 1


@needs_owners
def test_the_folder_and_its_files_are_private(cache: ProgramCache) -> None:
    before = os.umask(0)
    try:
        path = cache.add(KEY, b"code")
    finally:
        os.umask(before)
    assert path is not None and path.stat().st_mode & 0o777 == 0o600
    assert cache.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", [b"", b"cod", b"Code", b"code and more"])
def test_a_damaged_program_is_never_loaded(
    cache: ProgramCache, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = cache.add(KEY, b"code")
    assert path is not None
    path.write_bytes(damage)
    assert cache.find(KEY) is None and not path.exists()
    assert "is damaged" in caplog.text


@needs_owners
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(
    cache: ProgramCache, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache.add(KEY, b"code")
    cache.folder.chmod(mode)
    assert cache.find(KEY) is None and cache.add(OTHER, b"code") is None
    assert "other users can write to" in caplog.text and "chmod 700" in caplog.text
    cache.folder.chmod(0o700)
    assert content_of(cache) == b"code", "the program itself was not removed"


@needs_owners
def test_a_folder_of_another_user_is_not_used(
    cache: ProgramCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.add(KEY, b"code")
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert cache.find(KEY) is None


@needs_owners
def test_files_that_others_can_write_to_and_links_are_not_loaded(
    cache: ProgramCache, tmp_path: Path
) -> None:
    path = cache.add(KEY, b"code")
    assert path is not None
    path.chmod(0o666)
    assert cache.find(KEY) is None
    path.chmod(0o600)
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    assert cache.find(KEY) is None and elsewhere.exists()


def test_the_least_recently_used_program_goes_first(cache: ProgramCache) -> None:
    keys = [character * 32 for character in "abc"]
    for age, key in enumerate(keys):
        path = cache.add(key, key.encode() * 10)  # 320 bytes
        assert path is not None
        os.utime(path, (age, age))
    assert cache.find(keys[0]) is not None  # now it is the one that was used last
    cache.add(KEY, b"x" * 320)
    assert cache.find(keys[1]) is None
    assert all(cache.find(key) is not None for key in (keys[0], keys[2], KEY))


def test_a_program_that_is_larger_than_the_limit_is_not_kept(cache: ProgramCache) -> None:
    cache.add(KEY, b"code")
    assert cache.add(OTHER, b"x" * 1001) is None
    assert content_of(cache) == b"code"


@pytest.mark.parametrize("keys", [[KEY] * 8, [f"{number:032x}" for number in range(8)]])
def test_many_writers_leave_one_whole_program(cache: ProgramCache, keys: list[str]) -> None:
    """Also where all programs together are larger than the limit, so that writers remove some."""
    contents = [bytes([number]) * 300 for number in range(8)]
    programs = list(zip(keys, contents, strict=True))
    for _ in range(20):
        threads = [threading.Thread(target=cache.add, args=program) for program in programs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {content_of(cache, key) for key in keys} & set(contents)
    cache.add(KEY, contents[0])
    assert content_of(cache) == contents[0]
    assert not [path for path in cache.folder.iterdir() if path.name.startswith(".hiera-")]


def test_a_full_disk_is_a_message(cache: ProgramCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.folder.parent.parent.mkdir(exist_ok=True)
    cache.folder.parent.write_text("a file in place of the folder")
    assert cache.add(KEY, b"code") is None and cache.find(KEY) is None
    assert "is not kept for the next run" in caplog.text


def test_the_user_names_folder_and_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(program_cache.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert program_cache.default_folder() == tmp_path / "hiera" / "compiled"
    monkeypatch.setenv(program_cache.FOLDER_VARIABLE, str(tmp_path / "own"))
    monkeypatch.setenv(program_cache.LIMIT_VARIABLE, "0.5")
    found = ProgramCache()
    assert (found.folder, found.limit) == (tmp_path / "own", 5 * 10**8)
    for wrong in ("-1", "many", "nan", "1e3", "9" * 99):
        monkeypatch.setenv(program_cache.LIMIT_VARIABLE, wrong)
        with pytest.raises(UsageError, match="HIERA_COMPILED_GB is"):
            ProgramCache()


def test_clear_compiled_removes_programs_alone(
    hiera: Hiera, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(program_cache.FOLDER_VARIABLE, str(tmp_path))
    cache = ProgramCache()
    for key in (KEY, OTHER):
        cache.add(key, b"x" * 500_000)
    (tmp_path / "notes.txt").write_text("not ours")
    (compiler_cache.folder() / "ab").mkdir(parents=True)
    (compiler_cache.folder() / "ab" / "graph").write_bytes(b"x" * 250_000)
    code, out, _ = hiera("models", "--clear-compiled")
    assert code == 0 and out == f"removed 2 compiled programs, 1.2 MB, from {tmp_path}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert hiera("models", "--clear-compiled")[:2] == (
        0,
        f"removed 0 compiled programs, 0.0 MB, from {tmp_path}\n",
    )
    code, _, err = hiera("models", "nano", "--clear-compiled")
    assert code == 2 and "--clear-compiled" in err


# PyTorch's own cache ------------------------------------------------------------------------------


def test_old_files_of_the_compiler_go_first(tmp_path: Path) -> None:
    for age, name in enumerate("abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "graph").write_bytes(b"x" * 100)
        os.utime(tmp_path / name / "graph", (age, age))
    (tmp_path / compiler_cache.LOCK_NAME).write_bytes(b"x" * 1000)
    compiler_cache.shrink(tmp_path, 250)
    assert sorted(path.parent.name for path in tmp_path.glob("*/graph")) == ["c", "d"]


def test_a_folder_that_the_user_has_named_for_the_compiler_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiler_cache, "_lock", None)
    monkeypatch.setenv(program_cache.FOLDER_VARIABLE, str(tmp_path / "ours"))
    monkeypatch.setenv(compiler_cache.VARIABLE, str(tmp_path / "own"))
    compiler_cache.use()
    assert os.environ[compiler_cache.VARIABLE] == str(tmp_path / "own")
    monkeypatch.delenv(compiler_cache.VARIABLE)
    compiler_cache.use()
    assert os.environ[compiler_cache.VARIABLE] == str(compiler_cache.folder())
    assert compiler_cache.folder().is_dir()
    for made in (tmp_path / "ours", compiler_cache.folder()):  # also where the umask is 002
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    monkeypatch.setattr(compiler_cache, "_lock", None)


def test_programs_that_a_process_uses_are_not_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hiera: Hiera
) -> None:
    """The lock of a process that runs one keeps them, also if PyTorch's files lie elsewhere."""
    if sys.platform == "win32":
        pytest.skip("there are no locks on Windows")
    monkeypatch.setenv(program_cache.FOLDER_VARIABLE, str(tmp_path / "ours"))
    monkeypatch.setenv(compiler_cache.VARIABLE, str(tmp_path / "own"))
    monkeypatch.setattr(compiler_cache, "_lock", None)
    assert compiler_cache.hold() and compiler_cache.hold()
    ProgramCache(limit=1000).add(KEY, b"code")
    code, _, err = hiera("models", "--clear-compiled")
    assert code == 2 and "another process uses the compiled programs" in err
    assert ProgramCache(limit=1000).find(KEY) is not None
    handle = compiler_cache._lock
    assert handle is not None
    os.close(handle)  # as when that process ends
    code, out, _ = hiera("models", "--clear-compiled")
    assert code == 0 and "removed 1 compiled program" in out
    assert ProgramCache(limit=1000).find(KEY) is None


def test_a_process_that_begins_while_programs_are_cleared_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "win32":
        pytest.skip("there are no locks on Windows")
    monkeypatch.setenv(program_cache.FOLDER_VARIABLE, str(tmp_path / "ours"))
    monkeypatch.setattr(compiler_cache, "_lock", None)
    (compiler_cache.folder()).mkdir(mode=0o700, parents=True)
    compiler_cache.folder().parent.chmod(0o700)
    (compiler_cache.folder() / compiler_cache.LOCK_NAME).touch()
    held: list[bool] = []
    with compiler_cache.unused():
        thread = threading.Thread(target=lambda: held.append(compiler_cache.hold()))
        thread.start()
        thread.join(0.2)
        assert not held
        compiler_cache.clear()
    thread.join()
    assert held == [True] and compiler_cache._lock is not None
    with pytest.raises(UsageError, match="another process uses"), compiler_cache.unused():
        pass
    os.close(compiler_cache._lock)
