"""Files and folders that commands write: checks before any work, and locks while they work."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from hiera_core.atomic import TEMPORARY, atomic_file, translate_write_errors
from hiera_core.atomic.lock import LOCK_NAME, exclusive, exclusive_folder
from hiera_core.errors import UsageError

from ..output_formats import print_text

# Names of the files that a command leaves in a folder, and that it can continue from.
RESULTS = {
    "features": re.compile(r"(image|video)-\d{5,}\.(safetensors|npz|parquet)"),
    "rows": re.compile(r"part-\d{12,}-[0-9a-f]{8}\.parquet"),
}
LONGEST_ENDING = ".partial.json"  # the longest that is added to the name of an output file


def target_of(path: Path) -> Path:
    """Return the file to write: the path itself, or what it links to.

    Raises:
        UsageError: It is a folder, a device or a pipe, its folder is missing or read-only, or the
            system does not allow the name.
    """
    shown = repr(str(path))
    with _refused_as_usage(shown):
        is_folder = path.is_dir()
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        # A link such as /dev/fd/3 may lead to a pipe, which has a name but no folder.
        is_special = any(p.exists() and not p.is_file() for p in (path, target))
        if not is_folder:
            _check_length(target)
        has_folder = target.parent.is_dir()
    if is_folder:
        raise UsageError(f"output {shown} is a folder", "name a file in it")
    if is_special:
        raise UsageError(
            f"output {shown} is not a regular file", "leave out this option to print the results"
        )
    if not has_folder and target.parent.exists():
        raise UsageError(f"{str(target.parent)!r} is a file, not a folder", "choose another name")
    if not has_folder:
        raise UsageError(f"there is no folder {str(target.parent)!r}", "make it first")
    if not os.access(target.parent, os.W_OK):
        raise UsageError(f"folder {str(target.parent)!r} is read-only", "write to another folder")
    return target


def check_file(path: Path, overwrite: bool) -> Path:
    """Return the file to write for an output path.

    Raises:
        UsageError: The file exists (without `overwrite`), or cannot be written (see `target_of`).
    """
    target = target_of(path)
    if target.exists() and not overwrite:
        raise UsageError(f"output {str(path)!r} exists", "--overwrite replaces it")
    return target


@contextlib.contextmanager
def claim_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """Hold the lock of an output file within the block, and yield the file to write.

    Raises:
        UsageError: Another process writes to the file; see also `check_file`.
    """
    with exclusive(target_of(path), beside=True):
        yield check_file(path, overwrite)


def write_text(text: str, path: Path | None) -> None:
    """Write text to a file atomically, or to standard output.

    Raises:
        ReaderGone: The reader of standard output has closed it.
        OutputError: The text cannot be written.
    """
    if path is None:
        print_text(text)
        return
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


@contextlib.contextmanager
def claim_folder(
    folder: Path, may_exist: bool, results: Literal["features", "rows"] | None = None
) -> Iterator[Path]:
    """Hold the lock of an output folder within the block, and yield it. A missing one is made.

    Args:
        folder: The folder.
        may_exist: Whether the folder may hold files.
        results: What the command writes into it, if --resume can continue that.

    Raises:
        UsageError: The folder is not empty (without `may_exist`), another process writes to it, or
            it is a file or read-only.
    """
    check_folder(folder)
    with exclusive_folder(folder):
        found = [path.name for path in folder.iterdir() if not _is_ours(path.name)]
        if found and not may_exist:
            for what, pattern in RESULTS.items():
                if what == results and any(map(pattern.fullmatch, found)):
                    raise UsageError(
                        f"folder {str(folder)!r} holds {what} of an earlier run",
                        "--resume continues it, --overwrite removes them",
                    )
            raise UsageError(f"folder {str(folder)!r} is not empty", "--overwrite writes into it")
        yield folder


def check_folder(folder: Path) -> None:
    """Check that a folder can be written, or made.

    Raises:
        UsageError: It is a file or read-only, or the system does not allow the name.
    """
    with _refused_as_usage(repr(str(folder))):
        with contextlib.suppress(FileNotFoundError):
            folder.lstat()  # raises the other errors, such as that of a name that is too long
        is_file = os.path.lexists(folder) and not folder.is_dir()
        nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if is_file:
        raise UsageError(f"{str(folder)!r} is a file", "name a folder")
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UsageError(f"folder {str(nearest)!r} is read-only", "write to another folder")


@contextlib.contextmanager
def claim_part_of_folder(folder: Path, prefix: str, may_exist: bool) -> Iterator[Path]:
    """Hold the lock of the files in a folder whose names begin with a prefix, and yield the folder.
    Other processes may write to others of its files. A missing folder is made.

    Args:
        folder: The folder.
        prefix: Begin of the names.
        may_exist: Whether there may be such files.

    Raises:
        UsageError: There are such files (without `may_exist`), another process writes to them, or
            the folder is a file or read-only.
        OutputError: The folder cannot be made.
    """
    check_folder(folder)
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / prefix.rstrip("-"), beside=True):
        found = sorted(path.name for path in folder.iterdir() if path.name.startswith(prefix))
        if found and not may_exist:
            raise UsageError(
                f"folder {str(folder)!r} has files of this shard, such as {found[0]!r}",
                "--resume continues, --overwrite starts over",
            )
        yield folder


def _is_ours(name: str) -> bool:
    """Return whether a file is a lock, or what a killed process left."""
    return name == LOCK_NAME or TEMPORARY.fullmatch(name) is not None


def _check_length(path: Path) -> None:
    """Raise an OSError if the system does not allow names as long as this one and its endings."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.with_name(f".{path.name}{LONGEST_ENDING}").lstat()


@contextlib.contextmanager
def _refused_as_usage(shown: str) -> Iterator[None]:
    """Convert errors of looking at a path: too long, a NUL in it, a folder that is closed to us."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"output {shown} cannot be written ({reason})", "choose another name or folder"
        ) from error
