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
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError, UsageError

try:
    import fcntl
except ImportError:  # Windows: outputs are not locked there
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"  # lock of a folder, in it
# What flock reports if another process holds the lock. Any other error, such as that of a file
# system without locks, says nothing about other processes. Outputs there are not locked.
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
NO_LOCK_FILES = (errno.ELOOP, errno.EISDIR, errno.ENXIO)  # what open reports on links and the like
BEGINNING = "process "  # of the contents of a lock file


@contextlib.contextmanager
def exclusive(output: Path, *, beside: bool = False) -> Iterator[None]:
    """Hold the lock of an output file or folder within the `with` block.

    Args:
        output: The file, or a folder that exists. A folder's lock is in it (`LOCK_NAME`), a file's
            is `.NAME.lock` beside it. The lock file is removed at the end.
        beside: The lock of a folder is beside it, too, because the folder itself is replaced.

    Raises:
        UsageError: Another process holds the lock. The message says which. Or a file that is not a
            lock file has its name.
        OutputError: The lock file cannot be created.
    """
    inside = output.is_dir() and not beside
    path = output / LOCK_NAME if inside else output.with_name(f".{output.name}.lock")
    try:
        handle = _acquire(path)
    except OSError as error:
        if error.errno in NO_LOCK_FILES:
            raise _not_a_lock(path) from error
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


def share(handle: int) -> bool:
    """Hold a lock on an open file that others can hold, too, until it is closed. Return False if
    somebody holds its lock alone."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in HELD
    return True


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
        return "held" if error.errno in HELD else "unknown"
    return "ours"


def _acquire(path: Path) -> int | None:
    """Create, open and lock a lock file. Return its handle, or None if the lock is held.

    A folder that somebody has sent may hold a link, or another file, of this name. It is refused,
    because a lock file is overwritten.

    Raises:
        UsageError: The file is not a lock file.
    """
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    while True:
        handle = os.open(path, flags, 0o666)
        try:
            if not _may_be_lock(handle):
                raise _not_a_lock(path)
            if not try_lock(handle):
                os.close(handle)
                return None
            # The last holder may have removed the file after we opened it. Then our lock is on a
            # file that has no name, and does not keep others out.
            if _is_file_at(path, handle):
                os.truncate(handle, 0)
                os.write(handle, f"{BEGINNING}{os.getpid()} on {socket.gethostname()}".encode())
                return handle
        except BaseException:  # a full disk, or an interruption: the lock ends with the handle
            with contextlib.suppress(OSError):
                os.close(handle)
            raise
        os.close(handle)


def _may_be_lock(handle: int) -> bool:
    """Return whether an open file is one that `_acquire` has written, or is about to write."""
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        return False
    beginning = os.read(handle, len(BEGINNING))
    os.lseek(handle, 0, os.SEEK_SET)
    return BEGINNING.encode().startswith(beginning)  # a full disk may have cut it


def _not_a_lock(path: Path) -> UsageError:
    return UsageError(f"{str(path)!r} is not a lock file", "remove it, or write elsewhere")


def _is_file_at(path: Path, handle: int) -> bool:
    """Return whether the open file is the one that the path names."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Return who holds a lock, as its file says."""
    try:
        return path.read_text(errors="replace")[:200] or "it has just begun"
    except OSError:
        return "it has just ended"
