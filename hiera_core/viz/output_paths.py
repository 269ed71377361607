"""Paths of output files: below one folder, named after the paths of the inputs."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

from ..data.media_types import ENDINGS
from ..errors import InputError, OutputError

MAX_NAME_BYTES = 240  # file systems allow 255
# Errors that are due to the name of one input. Others, such as a full disk, are due to the folder.
THIS_INPUT = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP)


def output_path(folder: Path, name: str, ending: str, keeps: Collection[str] = ()) -> Path:
    """Return the path of an input's output file, after creating its folder.

    Args:
        folder: The folder of all results.
        name: Name of the input, as in its record.
        ending, keeps: See `relative_output_path`.

    Raises:
        InputError: The file would replace the input, its path is longer than the system allows, or
            another result has the name of its folder.
        OutputError: The folder cannot be created.
    """
    path = folder / relative_output_path(name, ending, keeps)
    try:
        if path.exists() and Path(name).exists() and path.samefile(name):
            raise InputError("the result would replace the input", "write to another folder")
        for parent in path.relative_to(folder).parents:
            if (folder / parent).is_symlink() and parent != Path():
                raise InputError(f"{folder / parent} is a link", "write to another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.lstat()
    except OSError as error:
        if error.errno in THIS_INPUT:
            raise InputError(
                f"its result cannot be written to {str(path)[:200]!r} ({error.strerror})",
                "write to a folder with a shorter path, or process it alone",
            ) from error
        raise OutputError(f"{path.parent} cannot be created ({error.strerror})") from error
    return path


def relative_output_path(name: str, ending: str, keeps: Collection[str] = ()) -> PurePosixPath:
    """Return the path of an input's output file, relative to the folder of all results.

    It is the input's own path or URL, without `..`: so the files of a/x.jpg and b/x.jpg differ, and
    nothing is written outside the folder. Names that already have the extension of an output file
    are kept, unless the extension of an image or video stands before it. `ending` is appended to
    all others, after a tilde if they do not have the extension of an image or video: so the files
    of x.webp, x.webp.png and x differ.

    Args:
        name: Name of the input, as in its record.
        ending: Extension of the output file, such as ".png".
        keeps: Other extensions that an output file may have.
    """
    if name.startswith(("http://", "https://")):
        name = _path_of_url(name).replace(":", "_")
    name = "stdin" if name == "-" else name
    plain = name.replace("\\", "/").replace("\0", "_")
    parts = ["__" if part == ".." else part for part in PurePosixPath(plain).parts if part != "/"]
    path = PurePosixPath(*map(_shorten_name, parts))
    is_media = path.suffix.lower() in ENDINGS
    if path.suffix.lower() in {ending, *keeps} and PurePosixPath(path.stem).suffix not in ENDINGS:
        return path
    tilde = "" if is_media or name == "stdin" else "~"
    return path.with_name(path.name + tilde + ending)


def _path_of_url(text: str) -> str:
    """`https://host/a/x.jpg?v=1` -> `host/a/x.jpg_v=1`"""
    try:
        url = urlparse(text)
    except ValueError:  # it is not valid: fetching it gives the reason
        return text
    return f"{url.netloc}{unquote(url.path)}{'_' + url.query if url.query else ''}"


def _shorten_name(name: str) -> str:
    """Return a name that file systems allow, with space for an extension.

    A hash distinguishes long names that begin alike.
    """
    raw = os.fsencode(name)
    if len(raw) <= MAX_NAME_BYTES:
        return name
    ending = PurePosixPath(name).suffix if len(PurePosixPath(name).suffix) < 10 else ""
    digest = hashlib.sha256(raw).hexdigest()[:8]
    return os.fsdecode(raw[: MAX_NAME_BYTES - 30]) + f"~{digest}{ending}"
