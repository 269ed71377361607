"""Tests of the memory that a process keeps when it frees it."""

import os
import platform
import subprocess
import sys
import types

import pytest

from hiera_core.process import allocator

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
# Allocates and frees 64 MiB twenty times, and prints how many pages the system had to fill.
FAULTS = """
import resource
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = bytearray(b"x") * (1 << 26)
del block
before = faults()
for _ in range(20):
    block = bytearray(b"x") * (1 << 26)
    del block
print(faults() - before)
"""
COMMAND = """
import sys
import hiera_cli.app as app
app.run = lambda arguments: 0
app._exit_now = lambda code: None
app.main()
assert "torch" not in sys.modules
"""


def faults(before: str, **settings: str) -> int:
    """Return what `FAULTS` prints in a new process that first runs `before`."""
    environment = {k: v for k, v in os.environ.items() if k not in allocator.USERS_CHOICES}
    done = subprocess.run(
        [sys.executable, "-c", before + FAULTS],
        capture_output=True,
        text=True,
        check=True,
        env=environment | settings,
    )
    return int(done.stdout)


def test_the_command_line_keeps_large_blocks() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    pages = 20 * (1 << 26) // page
    assert faults("") > pages // 2  # if this fails, the C library has become better by itself
    assert faults(COMMAND) < pages // 10


def test_the_user_s_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    assert faults(COMMAND, MALLOC_MMAP_THRESHOLD_="1000000") > 10 * (1 << 26) // page
    monkeypatch.delenv(allocator.HUGE_PAGES, raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert not allocator.keep_freed_memory()
    assert allocator.HUGE_PAGES not in os.environ | allocator.environment()


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_left_alone(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.delenv(allocator.HUGE_PAGES, raising=False)
    assert not allocator.keep_freed_memory()
    assert allocator.HUGE_PAGES not in os.environ | allocator.environment()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in allocator.USERS_CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(allocator.HUGE_PAGES, "0")  # stays; and is removed after the test
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())  # musl has no mallopt
    assert not allocator.keep_freed_memory()
    assert allocator.environment()[allocator.HUGE_PAGES] == "0"


def test_older_versions_keep_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They refuse so high a threshold."""
    for name in allocator.USERS_CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(allocator.HUGE_PAGES, "0")
    given: dict[int, int] = {}

    def mallopt(setting: int, value: int) -> int:
        given[setting] = value
        return int(setting != allocator.M_MMAP_THRESHOLD)

    library = types.SimpleNamespace(mallopt=mallopt)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    assert allocator.keep_freed_memory()
    assert given[allocator.M_MMAP_MAX] == 0
