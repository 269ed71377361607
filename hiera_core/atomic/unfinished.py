"""Writes in progress: what a signal has to wait for, or to undo, before the process ends.

Two facts make this necessary. Python raises the exception of a signal in the middle of whatever the
main thread does, so a write would be cut. And a process that has to end at once, from another
thread, runs no cleaning up of the main thread.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

# Maps every temporary file or folder to the file or folder that it will become.
_temporaries: dict[Path, Path] = {}
# Held while temporaries are renamed, so that no other thread undoes half of it.
_renaming = threading.RLock()
_deferring = 0  # number of blocks of `finish_first` that the main thread is in
_deferred: BaseException | None = None


@contextlib.contextmanager
def finish_first() -> Iterator[None]:
    """Within the block, `raise_or_defer` in the main thread does not interrupt. Its exception is
    raised at the end of the block.

    In other threads this does nothing, because signals do not interrupt them.
    """
    global _deferring, _deferred
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1
        if _deferring == 0 and _deferred is not None:
            error, _deferred = _deferred, None
            raise error


def raise_or_defer(error: BaseException) -> None:
    """Raise an exception, or leave that to the end of the write that the main thread is in.

    This is for signal handlers, which run in the main thread.
    """
    global _deferred
    if not _deferring:
        raise error
    _deferred = error


@contextlib.contextmanager
def temporary(path: Path, final: Path) -> Iterator[None]:
    """Register a temporary file or folder within the block."""
    _temporaries[path] = final
    try:
        yield
    finally:
        _temporaries.pop(path, None)


@contextlib.contextmanager
def renaming() -> Iterator[None]:
    """Keep other threads from undoing writes within the block."""
    with _renaming:
        yield


def being_finished() -> list[Path]:
    """Return the files that the main thread finishes before a signal interrupts it."""
    return list(_temporaries.values()) if _deferring else []


def undo_all(patience: float = 10.0) -> list[Path]:
    """Remove all temporary files and folders; the process has to end right after this.

    Args:
        patience: Seconds to wait for renames to end.

    Returns:
        The files and folders that are not written now.
    """
    _renaming.acquire(timeout=patience)  # it is not released: nothing is renamed from now on
    undone = dict(_temporaries)
    for path in undone:
        remove(path)
    return sorted(set(undone.values()))


def remove(path: Path) -> None:
    """Remove a temporary file or folder. Errors are ignored, since nothing depends on it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()
