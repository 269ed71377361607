"""Outputs at remote places: written to a temporary folder, and sent when they are complete."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hiera_core.errors import UsageError
from hiera_core.places.uploads import Upload

RESUME_HINT = "write to a local file or folder, or use --rows, which resumes at remote places"


def is_file_name(url: str, endings: Sequence[str]) -> bool:
    """Return whether a URL names a file: by one of the endings. Others name a folder.

    Raises:
        UsageError: It has another ending.
    """
    name = url.rpartition("/")[2]
    ending = Path(name).suffix.lower()
    if ending and ending not in endings:
        raise UsageError(
            f"unknown file extension in {name!r}",
            f"end it in {', '.join(endings)}; or, for a folder, in /",
        )
    return bool(ending)


@contextlib.contextmanager
def open_file(
    url: str,
    overwrite: bool,
    prefix: str = "",
    check: Callable[[Sequence[str], str], None] | None = None,
) -> Iterator[tuple[Path, Upload]]:
    """Yield where to write a file that goes to a remote place, and what sends it.

    Args:
        url: The file.
        overwrite: Whether it may exist.
        prefix: Begins its name, if this process writes a part of the results.
        check: Called with the names that end like the file in its folder, and with the folder.

    Raises:
        UsageError: It names a folder, or exists; see also `Upload`.
        OutputError: The place does not answer.
    """
    folder, _, name = url.rpartition("/")
    if not name or folder.endswith(("/", ":")):
        raise UsageError(f"output {url!r} is a folder", "name a file in it")
    upload = Upload(folder)
    try:
        if check is not None:
            check(upload.place.names("", name), folder)
        name = f"{prefix}{name}"
        if upload.place.has(name) and not overwrite:
            raise UsageError(f"output '{folder}/{name}' exists", "--overwrite replaces it")
        yield upload.folder / name, upload
    finally:
        upload.close()


@contextlib.contextmanager
def open_folder(
    url: str,
    overwrite: bool,
    prefix: str = "",
    check: Callable[[Sequence[str], str], None] | None = None,
) -> Iterator[Upload]:
    """Yield what sends files to a folder at a remote place. There are no locks.

    Args:
        url: The folder.
        overwrite: Whether it may hold files.
        prefix: Begins the names of the files, if other processes write to the folder, too.
        check: Called with the names of the files in the folder, and with the folder.

    Raises:
        UsageError: It holds files; see also `Upload`.
        OutputError: The place does not answer.
    """
    upload = Upload(url)
    try:
        names = upload.place.names("", "")
        if check is not None:
            check(names, url)
        found = [name for name in names if name.startswith(prefix)]
        if found and not overwrite:
            raise UsageError(
                f"folder {url!r} has files such as {found[0]!r}", "--overwrite writes into it"
            )
        yield upload
    finally:
        upload.close()
