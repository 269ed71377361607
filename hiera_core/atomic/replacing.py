"""Write files and folders atomically: they appear under their final name only when complete.

A temporary file or folder has a name of its own, `.hiera-` and 16 hexadecimal digits, in the folder
of the final one. While it is written, this process holds its lock. If the process is killed, the
lock ends, and the next process that writes to the folder removes what is left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import OutputError
from . import unfinished
from .lock import lock_state
from .unfinished import NEW, OLD

TEMPORARY = re.compile(r"\.hiera-[0-9a-f]{16}")
# A younger temporary file may belong to a process that has created it, and locks it next.
STALE_S = 60.0
# What fsync and open report on a system that cannot sync a folder.
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES,
               errno.EPERM, errno.EISDIR)  # fmt: skip

_cleared: set[Path] = set()  # folders in which this process has looked for stale files


@contextlib.contextmanager
def atomic_file(path: Path, *, is_private: bool = False) -> Iterator[Path]:
    """Yield a temporary path. When the block ends without an error, the file that was written
    there is flushed to disk (fsync) and renamed to `path`; otherwise it is removed.

    A file that is replaced keeps its permissions; with `is_private`, only this user can read or
    write the file. A link is replaced itself; what it points to does not change. In the command
    line, a signal waits until the block ends (see `unfinished`).

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    with unfinished.finish_first(path), translate_write_errors(path):
        permissions = 0o600 if is_private else _permissions(path)
        with _temporary_file(path, permissions) as (temporary, created_with):
            yield temporary
            _sync_file(temporary)
            # Some writers, such as that of safetensors, make the file private.
            temporary.chmod(created_with if permissions is None else permissions)
            with unfinished.renaming():
                temporary.replace(path)
            sync_folder(path.parent)


@contextlib.contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """Convert an OSError within the block, such as a full disk, to an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def atomic_destination(dest: Path, *, is_folder: bool) -> Iterator[Path]:
    """Yield a temporary folder to write into.

    When the block ends without an error, this folder is renamed to `dest` (`is_folder`), or its
    files are moved to the folder of `dest`: all of them, or none. Otherwise everything that was
    written is removed.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    hint = "free some space, or write elsewhere; no partial files remain"
    content = None
    try:
        with _temporary_folder(dest) as stage:
            content = stage / NEW
            content.mkdir()
            yield content
            for path in content.iterdir():
                _sync_file(path)
            names = sorted(path.name for path in content.iterdir())
            # `dest` itself comes last, because it may refer to the other files.
            names.sort(key=lambda name: name == dest.name)
            moves = [(content / name, dest.with_name(name)) for name in names]
            if is_folder:
                sync_folder(content)
                moves = [(content, dest)]
            with unfinished.finish_first(dest), unfinished.renaming():
                _replace_all(moves, stage / OLD)
            sync_folder(dest.parent)
    except OSError as error:
        raise OutputError(f"{dest} cannot be written ({error.strerror or error})", hint) from error
    except OutputError as error:  # its message names a file in the temporary folder
        message = error.message.replace(f"{content}/", f"{dest}: ")
        raise OutputError(message.replace(f": {dest.name} ", " "), hint) from error


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where the system can. Windows cannot open folders.

    Raises:
        OSError: The disk is damaged.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno in CANNOT_SYNC:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(handle)


# Temporary files and folders ----------------------------------------------------------------------


@contextlib.contextmanager
def _temporary_file(path: Path, permissions: int | None) -> Iterator[tuple[Path, int]]:
    """Create an empty file beside `path`, and remove it at the end unless it was renamed. Yield its
    path, and the permissions that it was created with.

    The system applies the umask. A file that will be private is private from the beginning.
    """
    temporary = _temporary_name(path)
    mode = 0o666 if permissions is None else permissions | 0o600
    with unfinished.temporary(temporary, path):
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        created_with = stat.S_IMODE(os.fstat(handle).st_mode)
        with _removed_at_the_end(temporary, handle):
            yield temporary, created_with


@contextlib.contextmanager
def _temporary_folder(dest: Path) -> Iterator[Path]:
    """Create a folder beside `dest`, and remove it at the end."""
    temporary = _temporary_name(dest)
    with unfinished.temporary(temporary, dest):
        temporary.mkdir()
        handle = None
        with contextlib.suppress(OSError):  # Windows cannot open folders
            handle = os.open(temporary, os.O_RDONLY)
        with _removed_at_the_end(temporary, handle):
            yield temporary


@contextlib.contextmanager
def _removed_at_the_end(temporary: Path, handle: int | None) -> Iterator[None]:
    """Hold the lock of a temporary file or folder, and remove it at the end.

    Args:
        temporary: The file or folder.
        handle: It, opened. Without a lock to hold it is closed at once, since Windows renames no
            files that are open.
    """
    if handle is not None and lock_state(handle) == "unknown":
        os.close(handle)
        handle = None
    try:
        yield
    finally:
        if not unfinished.holds_only_copy(temporary):
            unfinished.remove(temporary)
        if handle is not None:
            with contextlib.suppress(OSError):
                os.close(handle)


def _temporary_name(path: Path) -> Path:
    """Return a new name in the folder of `path`, after removing stale temporary files there."""
    _clear_stale(path.parent)
    return path.parent / f".hiera-{secrets.token_hex(8)}"


def _clear_stale(folder: Path) -> None:
    """Remove temporary files and folders that killed processes have left, once for each folder."""
    if folder in _cleared:
        return
    _cleared.add(folder)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if TEMPORARY.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_stale(folder / entry.name)


def _remove_if_stale(path: Path) -> None:
    """Remove a temporary file or folder if nobody holds its lock. Where there are no locks, nothing
    says whether it is in use, so it is kept."""
    found = path.lstat()
    if time.time() - found.st_mtime < STALE_S or not _is_ours(path):
        return
    is_folder = stat.S_ISDIR(found.st_mode)
    flags = os.O_RDONLY if is_folder else os.O_RDWR  # some file systems lock writers only
    handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        if lock_state(handle) == "ours":
            if is_folder:
                _restore(path)
            if not unfinished.holds_only_copy(path):
                unfinished.remove(path)
    finally:
        os.close(handle)


def _is_ours(path: Path) -> bool:
    """Return whether this user owns a file or folder. Links and devices are not ours."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    is_plain = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    return is_plain and (sys.platform == "win32" or found.st_uid == os.geteuid())


def _restore(stage: Path) -> None:
    """Finish or undo what `_replace_all` was doing when its process was killed.

    Only names that are missing are filled, because a folder that somebody has sent may hold a
    folder that only looks like a temporary one. If a new file is in place already, the missing ones
    come from the new files, too, so that they belong together.
    """
    names = unfinished.missing(stage)
    if not names or not _is_ours(stage / OLD):
        return
    new = {path.name for path in (stage / NEW).iterdir()} if _is_ours(stage / NEW) else set()
    is_replaced = not new.issuperset(path.name for path in (stage / OLD).iterdir())
    for name in names:
        source = NEW if is_replaced and name in new else OLD
        (stage / source / name).rename(stage.parent / name)


# Replacing ----------------------------------------------------------------------------------------


def _replace_all(moves: Sequence[tuple[Path, Path]], old: Path) -> None:
    """Rename files or folders: all of them, or, if one fails, none.

    A single file replaces another in one step. Otherwise existing targets are moved to the folder
    `old` first, because a folder cannot be renamed onto another that holds files.

    Args:
        moves: Pairs of a source and its target.
        old: A folder to create if it is needed.
    """
    if len(moves) == 1 and not moves[0][0].is_dir():
        source, target = moves[0]
        permissions = _permissions(target)
        if permissions is not None:
            source.chmod(permissions)
        source.replace(target)
        return
    begun: list[tuple[Path, Path]] = []

    def rename(source: Path, target: Path) -> None:
        begun.append((source, target))
        source.rename(target)

    try:
        for source, target in moves:
            if os.path.lexists(target):
                if target.is_dir() == source.is_dir():
                    source.chmod(stat.S_IMODE(target.stat().st_mode))
                old.mkdir(exist_ok=True)
                rename(target, old / target.name)
        for source, target in moves:
            rename(source, target)
    except BaseException:  # also an interruption, which in a library is not deferred
        for source, target in reversed(begun):
            if not os.path.lexists(source):
                with contextlib.suppress(OSError):  # then it stays, see `holds_only_copy`
                    target.rename(source)
        raise


def _permissions(path: Path) -> int | None:
    """Return the permissions of a file; None if there is no file of this name."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return stat.S_IMODE(found.st_mode) if stat.S_ISREG(found.st_mode) else None


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
