"""Locks: one process at a time writes to an output.

The lock of an output is a file beside it, or inside it if it is a folder. The operating system
holds it (flock), so it ends with its process, however that ends: a lock file that was left behind
by a killed process holds nothing, and the next process takes it over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from .errors import OutputError, UsageError

try:
    import fcntl
except ImportError:  # Windows: outputs are not locked there
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"  # lock of a folder, in it
# What flock reports on file systems without locks. Outputs there are not locked.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def exclusive(output: Path, *, beside: bool = False) -> Iterator[None]:
    """Hold the lock of an output file or folder within the `with` block.

    Args:
        output: The file, or a folder that exists. A folder's lock is in it (`LOCK_NAME`), a file's
            is `.NAME.lock` beside it. The lock file is removed at the end.
        beside: The lock of a folder is beside it, too, because the folder itself is replaced.

    Raises:
        UsageError: Another process holds the lock. The message says which.
        OutputError: The lock file cannot be created.
    """
    inside = output.is_dir() and not beside
    path = output / LOCK_NAME if inside else output.with_name(f".{output.name}.lock")
    try:
        handle = _acquire(path)
    except OSError as error:
        raise OutputError(f"{output} cannot be written ({error.strerror or error})") from error
    if handle is None:
        raise UsageError(
            f"another process is writing to {str(output)!r} ({_holder(path)})",
            "wait for it, stop it, or write elsewhere",
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone, or read-only by now
            path.unlink()
        os.close(handle)


@contextlib.contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Create a folder if it is missing, and hold its lock within the `with` block. A folder that
    was created here and is still empty at the end is removed.

    Raises:
        UsageError: Another process holds the lock. The message says which.
        OutputError: The folder or the lock file cannot be created.
    """
    is_new = not folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created ({error.strerror or error})") from error
    try:
        with exclusive(folder):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def try_lock(handle: int) -> bool:
    """Lock an open file. Return False if another process, or another handle, holds its lock."""
    return lock_state(handle) != "held"


def lock_state(handle: int) -> str:
    """Try to lock an open file or folder.

    Returns:
        `ours` if the lock is ours now, `held` if another process or handle holds it, and `unknown`
        on systems and file systems without locks.
    """
    if fcntl is None:
        return "unknown"
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return "unknown" if error.errno in UNSUPPORTED else "held"
    return "ours"


def _acquire(path: Path) -> int | None:
    """Create, open and lock a lock file. Return its handle, or None if the lock is held."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            if not try_lock(handle):
                os.close(handle)
                return None
            # The last holder may have removed the file after we opened it. Then our lock is on a
            # file that has no name, and does not keep others out.
            if _is_file_at(path, handle):
                os.truncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        except BaseException:  # a full disk, or an interruption: the lock ends with the handle
            with contextlib.suppress(OSError):
                os.close(handle)
            raise
        os.close(handle)


def _is_file_at(path: Path, handle: int) -> bool:
    """Return whether the open file is the one that the path names."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Return who holds a lock, as its file says."""
    try:
        return path.read_text(errors="replace")[:200] or "it has just begun"
    except OSError:
        return "it has just ended"
