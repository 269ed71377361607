"""Find the images and videos in a folder, and count the files that are passed over."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from .media_types import ENDINGS

HIDDEN = "hidden"
MAX_HIDDEN = 100_000  # in a hidden folder, such as `.snapshot` with copies of a whole disk
# What `passed_over` counts instead of an extension.
NO_EXTENSION = "without extension"


def find_files(
    folder: Path,
    *,
    recursive: bool,
    endings: frozenset[str] = ENDINGS,
    passed_over: Counter[str] | None = None,
    on_error: Callable[[Path, OSError], None] | None = None,
) -> Iterator[Path]:
    """Yield the files of a folder with these extensions, in name order, then those of its folders,
    one after another.

    Links are followed, to files and to folders. A folder that several links lead to, or that lies
    within itself by a link, is entered once. Hidden files and folders are left out.

    Args:
        folder: The folder.
        recursive: Also look into the folders within it.
        endings: Extensions of the files, in lower case.
        passed_over: Counts the files that are left out, by extension; hidden ones, and with
            `recursive` those in hidden folders, under `hidden`.
        on_error: Called with a folder that cannot be read. Otherwise its error is raised.
    """
    entered: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
            status = folder.stat()
        except OSError as error:
            if on_error is None:
                raise
            on_error(folder, error)
            continue
        here = (status.st_dev, status.st_ino)
        if here in entered:
            continue
        entered.add(here)
        inner = []
        for entry in found:
            if _is_folder(entry):
                if not entry.name.startswith("."):
                    inner.append(folder / entry.name)
                elif recursive and passed_over is not None and not entry.is_symlink():
                    passed_over[HIDDEN] += _count_files(entry.path)
            elif entry.name.startswith("."):
                _count(passed_over, HIDDEN)
            elif (ending := Path(entry.name).suffix.lower()) in endings:
                yield folder / entry.name
            else:
                _count(passed_over, ending or NO_EXTENSION)
        if recursive:
            waiting += reversed(inner)


def _count_files(folder: str) -> int:
    """Return how many files are in a folder and the folders within it, MAX_HIDDEN at most. A folder
    counts towards the limit, so that it takes a bounded time."""
    files = 0
    for folders, (_, _, names) in enumerate(os.walk(folder)):
        files += len(names)
        if files + folders >= MAX_HIDDEN:
            return min(files, MAX_HIDDEN)
    return files


def count_folders(folder: Path) -> int:
    """Return how many folders, hidden ones left out, are in a folder; 0 if it cannot be read."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return sum(_is_folder(entry) and not entry.name.startswith(".") for entry in entries)
    return 0


def describe(passed_over: Counter[str]) -> str:
    """`3 .txt, 1 hidden`: the counts, largest first."""
    counts = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {ending}" for ending, count in counts)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere, or to itself
        return False


def _count(passed_over: Counter[str] | None, key: str) -> None:
    if passed_over is not None:
        passed_over[key] += 1
