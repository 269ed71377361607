"""Where files made of inputs go: a folder that mirrors the inputs' own paths."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

from .errors import InputError, OutputError


def target(folder: Path, name: str, ending: str, keeps: Collection[str] = ()) -> Path:
    """The file below `folder` for what is made of an input; the folders above it are made.

    Args:
        folder: of all results.
        name: the input's, as in its record.
        ending, keeps: as for `mirrored`.

    Raises:
        InputError: it would replace the input itself.
        OutputError: its folder cannot be made.
    """
    path = folder / mirrored(name, ending, keeps)
    if path.exists() and Path(name).exists() and path.samefile(name):
        raise InputError("the result would replace the input", "write to another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be made ({error.strerror})") from error
    return path


def mirrored(name: str, ending: str, keeps: Collection[str] = ()) -> PurePosixPath:
    """A relative path for what is made of an input: its own, or its address; without `..`, so that
    a/x.jpg and b/x.jpg stay apart and nothing is written elsewhere.

    Names that end in `ending` or one of `keeps` stay as they are; to others `ending` is added.
    """
    if name.startswith(("http://", "https://")):
        url = urlparse(name)
        name = f"{url.netloc}{unquote(url.path)}{'_' + url.query if url.query else ''}"
        name = name.replace(":", "_")
    name = "stdin" if name == "-" else name
    plain = name.replace("\\", "/").replace("\0", "_")
    parts = ["__" if part == ".." else part for part in PurePosixPath(plain).parts if part != "/"]
    path = PurePosixPath(*parts)
    stays = path.suffix.lower() in {ending, *keeps}
    return path if stays else path.with_name(path.name + ending)
