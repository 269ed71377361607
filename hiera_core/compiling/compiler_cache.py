"""The cache of PyTorch's compiler, in a folder that outlives a restart of the machine.

PyTorch keeps graphs, kernels and the results of autotuning, each under a key of all that it depends
on, and looks them up again. By default they lie in a temporary folder and are never removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ..atomic.lock import share, try_lock
from ..errors import UsageError
from .program_cache import default_folder, is_private_folder, size_limit

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
NAME = "inductor"
LOCK_NAME = ".users"
WAIT_S = 10.0  # for a process that removes programs

_lock: int | None = None  # an open file; its lock says that this process uses the folder


def folder() -> Path:
    """Return the folder for PyTorch's compiler."""
    return default_folder() / NAME


def use() -> None:
    """Let PyTorch's compiler keep its files in our folder, unless the user has named another."""
    if hold():
        os.environ.setdefault(VARIABLE, str(folder()))


def hold() -> bool:
    """Say that this process uses compiled programs, until it ends. Return whether it can.

    If the files of PyTorch's compiler have grown beyond the limit, and no other process uses
    programs, the oldest ones are removed first.
    """
    global _lock
    if _lock is not None:
        return True
    if not size_limit():
        return False
    try:
        until = time.monotonic() + WAIT_S
        while True:
            # Each by itself: the parents that `mkdir` makes could be writable by the group.
            for place in (default_folder(), folder()):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_private_folder(folder()):
                return False
            handle = os.open(folder() / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
            if try_lock(handle):
                shrink(folder(), size_limit())
            if share(handle) and _is_there(handle):
                _lock = handle
                return True
            os.close(handle)  # another process removes old programs, or all of them
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
    except OSError:
        return False  # PyTorch uses its own folder


def shrink(place: Path, limit: int) -> None:
    """Remove the files that were written longest ago until the others fit a limit in bytes. A graph
    whose kernels are missing is compiled again."""
    files = []
    for path in place.rglob("*"):
        with contextlib.suppress(OSError):
            found = path.lstat()
            if path.is_file() and path.name != LOCK_NAME:
                files.append((found.st_mtime, found.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """Keep other processes from using compiled programs within the block.

    Raises:
        UsageError: One uses them now.
    """
    try:
        handle = os.open(folder() / LOCK_NAME, os.O_RDWR)
    except OSError:  # nobody has used any
        yield
        return
    try:
        if not try_lock(handle):
            raise UsageError(
                f"another process uses the compiled programs in {default_folder()}",
                "try again when it has ended",
            )
        yield
    finally:
        os.close(handle)


def clear() -> int:
    """Remove the files of PyTorch's compiler in our folder. Return their size in bytes."""
    size = 0
    for path in folder().rglob("*"):
        with contextlib.suppress(OSError):
            size += path.lstat().st_size if path.is_file() and path.name != LOCK_NAME else 0
    shutil.rmtree(folder(), ignore_errors=True)
    return size


def _is_there(handle: int) -> bool:
    """Return whether an open file is the lock file, which `clear` may have removed."""
    try:
        return os.path.samestat(os.fstat(handle), (folder() / LOCK_NAME).lstat())
    except FileNotFoundError:
        return False
