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

# What flock reports on file systems without locks. Outputs there are not locked.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Hold the lock of an output file or folder within the `with` block.

    Args:
        output: The file, or a folder that exists. A folder's lock is `.lock` in it, and a file's
            is `.NAME.lock` beside it. The lock file is removed at the end.

    Raises:
        UsageError: Another process holds the lock. The message says which.
        OutputError: The lock file cannot be created.
    """
    path = output / ".lock" if output.is_dir() else output.with_name(f".{output.name}.lock")
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


def try_lock(handle: int) -> bool:
    """Lock an open file. Return False if another process, or another handle, holds its lock."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in UNSUPPORTED
    return True


def _acquire(path: Path) -> int | None:
    """Create, open and lock a lock file. Return its handle, or None if the lock is held."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        if not try_lock(handle):
            os.close(handle)
            return None
        # The last holder may have removed the file after we opened it. Then our lock is on a file
        # that has no name, and does not keep others out.
        if _is_file_at(path, handle):
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
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
