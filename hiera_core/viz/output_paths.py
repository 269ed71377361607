"""Where files made of inputs go: a folder that mirrors the inputs' own paths."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

from ..data.sources import ENDINGS
from ..errors import InputError, OutputError

MAX_NAME_BYTES = 240  # file systems take 255


def output_path(folder: Path, name: str, ending: str, keeps: Collection[str] = ()) -> Path:
    """The file below `folder` for what is made of an input; the folders above it are made.

    Args:
        folder: of all results.
        name: the input's, as in its record.
        ending, keeps: as for `mirrored`.

    Raises:
        InputError: it would replace the input itself.
        OutputError: its folder cannot be made.
    """
    path = folder / relative_output_path(name, ending, keeps)
    if path.exists() and Path(name).exists() and path.samefile(name):
        raise InputError("the result would replace the input", "write to another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be made ({error.strerror})") from error
    return path


def relative_output_path(name: str, ending: str, keeps: Collection[str] = ()) -> PurePosixPath:
    """A relative path for what is made of an input: its own, or its address; without `..`, so that
    a/x.jpg and b/x.jpg stay apart and nothing is written elsewhere.

    Names that end in `ending` or one of `keeps` stay as they are. To others `ending` is added, and
    a tilde where they do not end as a picture or video: so x.webp, x.webp.png and x stay apart.
    """
    if name.startswith(("http://", "https://")):
        url = urlparse(name)
        name = f"{url.netloc}{unquote(url.path)}{'_' + url.query if url.query else ''}"
        name = name.replace(":", "_")
    name = "stdin" if name == "-" else name
    plain = name.replace("\\", "/").replace("\0", "_")
    parts = ["__" if part == ".." else part for part in PurePosixPath(plain).parts if part != "/"]
    path = PurePosixPath(*map(_shortened, parts))
    is_media = path.suffix.lower() in ENDINGS
    if path.suffix.lower() in {ending, *keeps} and PurePosixPath(path.stem).suffix not in ENDINGS:
        return path
    tilde = "" if is_media or name == "stdin" else "~"
    return path.with_name(path.name + tilde + ending)


def _shortened(part: str) -> str:
    """A name that a file system takes, with room for an ending; a hash tells long ones apart."""
    raw = os.fsencode(part)
    if len(raw) <= MAX_NAME_BYTES:
        return part
    ending = PurePosixPath(part).suffix if len(PurePosixPath(part).suffix) < 10 else ""
    mark = hashlib.sha256(raw).hexdigest()[:8]
    return os.fsdecode(raw[: MAX_NAME_BYTES - 30]) + f"~{mark}{ending}"
