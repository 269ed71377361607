"""Paths of output files: below one folder, named after the inputs."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

from ..data.media_types import ENDINGS
from ..errors import InputError, OutputError
from ..records import Record

OUTPUT_ENDINGS = (".png", ".mp4")
MAX_NAME_BYTES = 240  # file systems allow 255
STDIN_NAME, NAMELESS = "stdin", "input"
NOT_ON_WINDOWS = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]+$')
# Errors that are due to the name of one input. Others, such as a full disk, are due to the folder.
THIS_INPUT = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP)


def output_path(folder: Path, record: Record, ending: str) -> Path:
    """Return the path of an output file of a record, after creating its folder.

    Args:
        folder: The folder of all results.
        record: The record. If it has no `output_stem`, its file is named after its input alone, and
            may replace that of another input.
        ending: One of `OUTPUT_ENDINGS`.

    Raises:
        InputError: The file would replace the input, its path is longer than the system allows, or
            another result has the name of its folder.
        OutputError: The folder cannot be created.
    """
    stem = record.output_stem or split_ending(safe_parts(record.input)[-1])[0]
    path = folder / f"{stem}{ending}"
    try:
        if path.exists() and Path(record.input).exists() and path.samefile(record.input):
            raise InputError("the result would replace the input", "write to another folder")
        if path.is_dir() and not path.is_symlink():
            raise InputError(f"{path} is a folder", "write to another folder")
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


def safe_parts(name: str) -> tuple[str, ...]:
    """Return the parts of a path or URL, so that joined they are a path within any folder.

    There is at least one part. The last one is a file, with its extension; the others are folders,
    which never have the extension of an output file. So no file is in the place of a folder.
    """
    plain = name.replace("\\", "/").replace("\0", "_")
    folders, _, last = plain.rstrip("/").rpartition("/")
    if last in ("", "."):
        return (*_safe_folders(folders), NAMELESS)
    return (*_safe_folders(folders), _safe_part(last))


@functools.lru_cache(maxsize=1024)
def _safe_folders(path: str) -> tuple[str, ...]:
    parts = (_safe_part(part) for part in path.split("/") if part not in ("", "."))
    return tuple(f"{p}_" if p.lower().endswith(OUTPUT_ENDINGS) else p for p in parts)


def split_ending(name: str) -> tuple[str, str]:
    """Split a file name before the extension of an image or video: `x.jpg` -> `x`, `.jpg`, but
    `x.v2` -> `x.v2`, ``."""
    stem, dot, ending = name.rpartition(".")
    return (stem, dot + ending) if stem and f".{ending.lower()}" in ENDINGS else (name, "")


def split_url(text: str) -> tuple[str, str]:
    """Return host and path of a URL, decoded, and what follows them: `https://host:80/a%20b.jpg?v=1`
    -> `host_80/a b.jpg`, `_v=1`."""
    try:
        url = urlparse(text)
    except ValueError:  # it is not valid: fetching it gives the reason
        return text, ""
    query = _safe_part(re.sub(r"[/\\\0]", "_", f"_{url.query}")) if url.query else ""
    return url.netloc.replace(":", "_") + unquote(url.path, errors="surrogateescape"), query


def _safe_part(name: str) -> str:
    if name == "..":
        return "__"
    if len(name) == 2 and name[1] == ":":  # a drive
        name = f"{name[0]}_"
    if os.name == "nt":
        name = NOT_ON_WINDOWS.sub("_", name)
    if name.startswith(".hiera-"):  # like a temporary file that is not complete
        name = f"_{name}"
    return shorten_name(name)


def shorten_name(name: str) -> str:
    """Return a name that file systems allow, with space for an extension.

    A hash distinguishes long names that begin alike.
    """
    if len(name) <= MAX_NAME_BYTES // 4:  # a character has at most 4 bytes
        return name
    raw = os.fsencode(name)
    if len(raw) <= MAX_NAME_BYTES:
        return name
    ending = PurePosixPath(name).suffix if len(PurePosixPath(name).suffix) < 10 else ""
    digest = hashlib.sha256(raw).hexdigest()[:8]
    return os.fsdecode(raw[: MAX_NAME_BYTES - 30]) + f"~{digest}{ending}"
