"""Compiled programs on disk, kept for the next run. This module does not import torch.

A program is code, and loading it runs it. So programs are read only from a folder of this user that
nobody else can write to; no checkpoint names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ..atomic import atomic_file
from ..errors import HieraError, OutputError, UsageError

FOLDER_VARIABLE = "HIERA_COMPILED_FOLDER"
LIMIT_VARIABLE = "HIERA_COMPILED_GB"
DEFAULT_LIMIT_GB = 8.0  # Hiera-L in fp32 takes about 1 GB for each batch size
ENDING = ".pt2"
# The key, and the digest of the content, which tells whether a file is damaged.
NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{64})\.pt2")
READ_BYTES = 1 << 20
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
log = logging.getLogger("hiera")


def default_folder() -> Path:
    """Return the folder of programs: that of the variable HIERA_COMPILED_FOLDER, or one in the
    user's cache folder."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache or Path.home() / ".cache") / "hiera" / "compiled"


def size_limit() -> int:
    """Return the largest size of all programs together, in bytes: that of the variable
    HIERA_COMPILED_GB, or `DEFAULT_LIMIT_GB`. With 0, no program is kept.

    Raises:
        UsageError: The variable is not a number of at least 0.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(DEFAULT_LIMIT_GB)
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise UsageError(f"{LIMIT_VARIABLE} is {text!r:.60}", "give a number of gigabytes, or 0")
    return int(float(text) * 1e9)


class ProgramCache:
    """Programs by their keys. Several processes can use one folder at a time.

    Args:
        folder: The folder, which is created when it is needed. None: see `default_folder`.
        limit: Largest size of all programs, in bytes. None: see `size_limit`. The program that was
            used least recently is removed first.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = default_folder() if folder is None else folder
        self.limit = size_limit() if limit is None else limit

    def find(self, key: str) -> Path | None:
        """Return the file of a program, or None. A damaged file is removed.

        Args:
            key: 32 hexadecimal digits.
        """
        if not self._is_safe():
            return None
        for path, digest in self._files_of(key):
            if not _is_private(path):
                log.warning("%s is ignored: other users can write to it", path)
            elif _digest_of(path) == digest:
                with contextlib.suppress(OSError):
                    _set_time_of_use(path)
                return path
            else:
                log.warning("%s is damaged: the program is compiled again", path)
                _remove(path)
        return None

    def add(self, key: str, content: bytes | memoryview) -> Path | None:
        """Keep a program, and return its file; None if it cannot be kept, which a message says.

        Another process that adds programs may remove the file at any time.

        Args:
            key: 32 hexadecimal digits.
            content: The program.
        """
        if len(content) > self.limit:
            return None
        path = self.folder / f"{key}-{hashlib.sha256(content).hexdigest()}{ENDING}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_safe():
                return None
            with atomic_file(path, is_private=True) as temporary:
                temporary.write_bytes(content)
                _set_time_of_use(temporary)
        except (OSError, OutputError) as error:
            message = error.message if isinstance(error, HieraError) else str(error)
            log.warning("the compiled program is not kept for the next run: %s", message)
            return None
        self._remove_older(key, path)
        self._shrink()
        return path

    def clear(self) -> tuple[int, int]:
        """Remove all programs. Return their number, and their size in bytes."""
        removed = size = 0
        for path, found in self._files():
            if _remove(path):
                removed, size = removed + 1, size + found.st_size
        return removed, size

    def _remove_older(self, key: str, path: Path) -> None:
        """Remove the other files of a program, which other processes have compiled earlier."""
        times = {}
        for other, _ in self._files_of(key):
            with contextlib.suppress(OSError):
                times[other] = (other.stat().st_mtime_ns, other.name)
        for other, used in times.items():
            if path in times and used < times[path]:
                _remove(other)

    def _shrink(self) -> None:
        """Remove the programs that were used least recently until the others fit the limit.

        All processes remove in the same order, and the program that was used last stays: two of
        them that add programs at a time cannot remove each other's.
        """
        files = sorted(self._files(), key=lambda item: (item[1].st_mtime_ns, item[0].name))
        total = sum(found.st_size for _, found in files)
        for path, found in files[:-1]:
            if total <= self.limit:
                return
            if _remove(path) or not path.exists():  # or another process has removed it
                total -= found.st_size

    def _is_safe(self) -> bool:
        """Return whether only this user can write to the folder. A message says if not."""
        return is_private_folder(self.folder)

    def _files_of(self, key: str) -> list[tuple[Path, str]]:
        """Return the files of a program, with the digests in their names."""
        names = (NAME.fullmatch(path.name) for path, _ in self._files())
        return [(self.folder / name[0], name[2]) for name in names if name and name[1] == key]

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield the files of all programs. Other files in the folder are not ours."""
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name):
                    with contextlib.suppress(OSError):  # another process has removed it
                        yield Path(entry.path), entry.stat(follow_symlinks=False)


def is_private_folder(folder: Path) -> bool:
    """Return whether a folder exists and only this user can write to it. A message says if not."""
    try:
        found = folder.stat()
    except OSError:
        return False
    if stat.S_ISDIR(found.st_mode) and _is_ours(found):
        return True
    log.warning(
        "compiled programs are not kept: other users can write to %s; use chmod 700, or name "
        "another folder in %s",
        folder,
        FOLDER_VARIABLE,
    )
    return False


def _is_private(path: Path) -> bool:
    """Return whether a path is a regular file that only this user can write to."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and _is_ours(found)


def _is_ours(found: os.stat_result) -> bool:
    if sys.platform == "win32":  # a user's folders are private there
        return True
    return found.st_uid == os.geteuid() and not found.st_mode & WRITABLE_BY_OTHERS


def _digest_of(path: Path) -> str:
    """Return the SHA-256 of a file; "" if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


def _set_time_of_use(path: Path) -> None:
    """Set a file's times to this moment. A system's own clock for files may tick every 4 ms."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True
