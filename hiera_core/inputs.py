"""What a user names (files, folders, globs, lists, URLs, stdin) to a stream of sources, in order.

Nothing here is opened as a picture, and nothing is collected: a list of 100,000 files streams.
"""

from __future__ import annotations

import glob
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import InputError, UsageError

# In a folder these endings count as inputs; a file that is named is tried whatever its ending.
PICTURE_ENDINGS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".avif",
        ".jp2",
        ".mpo",
        ".ico",
        ".qoi",
    ]
)
VIDEO_ENDINGS = frozenset(
    [
        ".mp4",
        ".mkv",
        ".webm",
        ".mov",
        ".avi",
        ".m4v",
        ".mpg",
        ".mpeg",
        ".ts",
        ".wmv",
        ".flv",
        ".3gp",
    ]
)
SIGNATURES = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n",
    b"GIF8",
    b"BM",
    b"II*\0",  # TIFF, either byte order
    b"MM\0*",
    b"RIFF",  # WebP
    b"\0\0\0\x0cjP",  # JPEG 2000
    b"qoif",
)
MAX_DOWNLOAD_BYTES = 512 << 20
TIMEOUT_S = 30
STDIN = "-"


@dataclass(frozen=True)
class Source:
    """One input: its name as the user would know it, and where its bytes are."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    url: str | None = None

    def content(self) -> Path | bytes:
        """The path to read, or the bytes; a URL is fetched here, in a worker.

        Raises:
            InputError: the URL cannot be fetched.
        """
        if self.url is not None:
            return _download(self.url)
        if self.data is not None:
            return self.data
        assert self.path is not None
        return self.path


def expand(
    inputs: Iterable[str],
    *,
    recursive: bool = False,
    endings: frozenset[str] = PICTURE_ENDINGS | VIDEO_ENDINGS,
    stdin: BinaryIO | None = None,
) -> Iterator[Source]:
    """The sources that these arguments name, one by one.

    Args:
        inputs: files, folders, globs (`**` goes into folders), http(s) URLs, `@list.txt`, and `-`
            for standard input: a picture, or paths separated by newlines or NUL.
        recursive: also look into folders within folders.
        endings: which files of a folder count.
        stdin: in place of standard input.

    Raises:
        UsageError: a folder or glob without inputs, a list that cannot be read. (A single file
            that is missing is that input's own error, later.)
    """
    for text in inputs:
        if text == STDIN:
            yield from _from_stream(stdin or sys.stdin.buffer)
        elif text.startswith("@") and not Path(text).exists():
            yield from _from_list(Path(text[1:]))
        else:
            yield from _from_name(text, recursive, endings)


def check(inputs: Iterable[str], *, recursive: bool = False) -> None:
    """Find what can be found wrong before weights load: lists that are missing, empty folders.

    Raises:
        UsageError: as `expand`.
    """
    for text in inputs:
        path = Path(text)
        if text.startswith("@") and not path.exists() and not Path(text[1:]).is_file():
            raise UsageError(f"no list {text[1:]!r}", "give a file with one path a line")
        if text != STDIN and not path.exists() and glob.has_magic(text) and not _first_match(text):
            raise UsageError(f"nothing matches {text!r}", "check the pattern")
        if text != STDIN and path.is_dir():
            next(_from_folder(path, recursive, PICTURE_ENDINGS | VIDEO_ENDINGS))


def _from_name(text: str, recursive: bool, endings: frozenset[str]) -> Iterator[Source]:
    path = Path(text)
    if text.startswith(("http://", "https://")):
        yield Source(text, url=text)
    elif path.is_dir():
        yield from _from_folder(path, recursive, endings)
    elif not path.exists() and glob.has_magic(text):
        matches = (Path(p) for p in sorted(glob.iglob(text, recursive=True)))
        yield from (Source(str(p), path=p) for p in matches if p.is_file())
    else:
        yield Source(text, path=path)


def _from_folder(folder: Path, recursive: bool, endings: frozenset[str]) -> Iterator[Source]:
    """Files in name order, a folder at a time, hidden ones left out."""
    found = False
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if recursive else []
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in endings:
                found = True
                path = Path(root) / name
                yield Source(str(path), path=path)
    if not found:
        hint = "" if recursive else "--recursive looks into folders within it"
        raise UsageError(f"folder {str(folder)!r} holds no pictures or videos", hint)


def _from_list(path: Path) -> Iterator[Source]:
    try:
        with path.open("rb") as file:
            yield from _lines(file, b"")
    except OSError as error:
        raise UsageError(f"list {str(path)!r} cannot be read ({error.strerror})") from error


def _from_stream(stream: BinaryIO) -> Iterator[Source]:
    """A picture when it begins like one, else paths."""
    start = stream.read(16)
    if start.startswith(SIGNATURES):
        yield Source(STDIN, data=start + stream.read())
    else:
        yield from _lines(stream, start)


def _lines(stream: BinaryIO, start: bytes) -> Iterator[Source]:
    """Paths or URLs separated by newlines, or by NUL if one comes first. Names are kept byte for
    byte (`os.fsdecode`), UTF-8 or not."""
    rest, separator = start, b""
    while True:
        block = stream.read(1 << 16)
        rest += block
        if not separator and (b"\0" in rest or b"\n" in rest or not block):
            separator = b"\0" if b"\0" in rest else b"\n"
        if separator:
            *lines, rest = rest.split(separator)
            yield from (_line(line) for line in lines if line.strip())
        if not block:
            break
    if rest.strip():
        yield _line(rest)


def _line(line: bytes) -> Source:
    text = os.fsdecode(line.removesuffix(b"\r"))
    if text.startswith(("http://", "https://")):
        return Source(text, url=text)
    return Source(text, path=Path(text))


def _first_match(pattern: str) -> str | None:
    return next(glob.iglob(pattern, recursive=True), None)


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "hiera-toolkit"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            data: bytes = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise InputError(f"cannot be fetched ({error})", "check the address") from error
    except Exception as error:  # http.client raises its own types on broken replies
        raise InputError(f"broken reply ({type(error).__name__})", "try again") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise InputError(f"larger than {MAX_DOWNLOAD_BYTES >> 20} MiB", "download it yourself")
    return data
