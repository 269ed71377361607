"""Writes in progress: what a signal has to wait for, or to undo, before the process ends.

Two facts make this necessary. Python raises the exception of a signal in the middle of whatever the
main thread does, so a write would be cut. And a process that has to end at once, from another
thread, runs no cleaning up of the main thread.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

NEW, OLD = "new", "old"  # what a temporary folder holds: the new files, and those they replace
# Maps every temporary file or folder to the file or folder that it will become.
_temporaries: dict[Path, Path] = {}
# Held while temporaries are renamed, so that no other thread undoes half of it.
_renaming = threading.RLock()
_finishing: list[Path] = []  # what the blocks of `finish_first` write that the main thread is in
_deferred: BaseException | None = None


@contextlib.contextmanager
def finish_first(final: Path) -> Iterator[None]:
    """Within the block, `raise_or_defer` in the main thread does not interrupt. Its exception is
    raised at the end of the block.

    In other threads this does nothing, because signals do not interrupt them.

    Args:
        final: The file or folder that the block writes.
    """
    global _deferred
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _finishing.append(final)
    try:
        yield
    finally:
        _finishing.pop()
        if not _finishing and _deferred is not None:
            error, _deferred = _deferred, None
            raise error


def raise_or_defer(error: BaseException) -> None:
    """Raise an exception, or leave that to the end of the write that the main thread is in.

    This is for signal handlers, which run in the main thread.
    """
    global _deferred
    if not _finishing:
        raise error
    _deferred = error


def deferred() -> BaseException | None:
    """Return the exception that waits for the end of the write, or None. A long block of
    `finish_first` looks at it to end early."""
    return _deferred


@contextlib.contextmanager
def defer_keyboard_interrupts() -> Iterator[None]:
    """Within the block, the first Ctrl-C goes through `raise_or_defer`. The second one raises
    KeyboardInterrupt at once.

    This is for programs that use the library. If they, or the command line, handle SIGINT
    themselves, nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if _deferred is not None:
            raise KeyboardInterrupt
        raise_or_defer(KeyboardInterrupt())

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
    return list(dict.fromkeys(_finishing))


def undo_all(patience: float = 10.0) -> list[Path]:
    """Remove all temporary files and folders; the process has to end right after this.

    Args:
        patience: Seconds to wait for renames to end.

    Returns:
        The files and folders that are not written now.
    """
    # The lock is not released: nothing is renamed from now on. If renames have not ended in time,
    # nothing is removed either, because a temporary folder may hold the only copy of a file. The
    # next process that writes there restores it.
    if _renaming.acquire(timeout=patience):
        for path in list(_temporaries):
            if not holds_only_copy(path):
                remove(path)
    return sorted(set(_temporaries.values()))


def holds_only_copy(temporary: Path) -> bool:
    """Return whether a temporary folder holds a file that it was to replace, and nothing is in its
    place."""
    return bool(missing(temporary))


def missing(temporary: Path) -> list[str]:
    """Return the names of files that a temporary folder was to replace, and that are gone from
    their place. Its folder `old` holds them."""
    old = temporary / OLD
    if old.is_symlink() or not old.is_dir():
        return []
    names = sorted(path.name for path in old.iterdir())
    return [name for name in names if not os.path.lexists(temporary.parent / name)]


def remove(path: Path) -> None:
    """Remove a temporary file or folder. Errors are ignored, since nothing depends on it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()
