"""What a user names (files, folders, globs, lists, URLs, stdin) to a stream of sources, in order.

Nothing here is opened as a picture, and nothing is collected: a list of 100,000 files streams.
What fails on the way (a list that cannot be read, a folder that is gone) is a source that fails,
so that every input keeps its place.
"""

from __future__ import annotations

import contextlib
import glob
import http.client
import os
import re
import stat
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError, UsageError
from ..records import Kind

# In a folder these endings count as inputs; a file that is named is tried whatever its ending.
PICTURE_ENDINGS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 .mpo "
    ".ico .qoi".split()
)
VIDEO_ENDINGS = frozenset(
    ".mp4 .mkv .webm .mov .avi .m4v .mpg .mpeg .ts .m2ts .wmv .flv .3gp .ogv".split()
)
ENDINGS = PICTURE_ENDINGS | VIDEO_ENDINGS
SIGNATURE_BYTES = 200  # how much of a file `sniff` wants to see
_PICTURES = re.compile(
    rb"\xff\xd8\xff"  # JPEG
    rb"|\x89PNG\r\n|GIF8[79]a|II[*+]\0|MM\0[*+]|RIFF....WEBP|qoif.{8}[\x03\x04]"
    rb"|BM....\0\0\0\0|P[1-6][\s#]+[\d#]|\0\0\x01\0[^\0]"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51"  # JPEG 2000, with and without its box
    rb"|....ftyp(avif|avis|heic|heix|hevc|mif1|msf1)",
    re.DOTALL,
)
_VIDEOS = re.compile(
    rb"....(ftyp|moov|mdat|free|skip|wide|pnot)"  # MP4, QuickTime
    rb"|\x1a\x45\xdf\xa3"  # Matroska, WebM
    rb"|RIFF....AVI |FLV\x01|OggS\0|\0\0\x01[\xba\xb3]"  # MPEG programme and elementary streams
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11"  # ASF
    rb"|\x47.{187}\x47|.{4}\x47.{191}\x47",  # MPEG transport stream, 188 or 192 bytes a packet
    re.DOTALL,
)
MAX_DOWNLOAD_BYTES = 512 << 20
TIMEOUT_S = 30
STDIN = "-"
URLS = ("http://", "https://")


@dataclass(frozen=True)
class Source:
    """One input: its name as the user would know it, and where its bytes are."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    url: str | None = None
    span: tuple[int, int] | None = None  # offset and size within the path: a member of a tar
    error: InputError | None = None  # already known not to work

    def content(self) -> Path | bytes:
        """The path to read, or the bytes; a URL is fetched here, in a worker.

        Raises:
            InputError: the URL cannot be fetched, or there is no such file.
        """
        if self.error is not None:
            raise self.error
        if self.url is not None:
            return _download(self.url)
        if self.data is not None:
            return self.data
        assert self.path is not None
        return _regular(self.path) if self.span is None else _part(self.path, *self.span)

    @property
    def looks_like_video(self) -> bool:
        """By its first bytes where they are at hand, else by its ending."""
        kind = None
        with contextlib.suppress(OSError):
            if self.data is not None:
                kind = sniff_kind(self.data[:SIGNATURE_BYTES])
            elif self.path is not None and self.span is None and self.path.is_file():
                with self.path.open("rb") as file:
                    kind = sniff_kind(file.read(SIGNATURE_BYTES))
        if kind is not None:
            return kind == "video"
        ending = Path(self.name.partition("?")[0]).suffix.lower()
        # An address need not end in what it holds.
        return ending in VIDEO_ENDINGS or (self.url is not None and ending not in ENDINGS)


def kind_of(content: Path | bytes, name: str) -> Kind:
    """Picture or video: the content decides, and the ending of `name` where it says nothing.

    Raises:
        InputError: the file cannot be read, or is empty.
    """
    if isinstance(content, bytes):
        start = content[:SIGNATURE_BYTES]
    else:
        try:
            with content.open("rb") as file:
                start = file.read(SIGNATURE_BYTES)
        except OSError as error:
            raise _unreadable(error) from error
    if not start:
        raise InputError("empty file", "the file is damaged or not a picture or video")
    ending = Path(name.partition("?")[0]).suffix.lower()
    return sniff_kind(start) or ("video" if ending in VIDEO_ENDINGS else "image")


def sniff_kind(start: bytes) -> Kind | None:
    """What the first bytes of a file say it is."""
    if _PICTURES.match(start):
        return "image"
    return "video" if _VIDEOS.match(start) else None


def expand(
    inputs: Iterable[str],
    *,
    recursive: bool = False,
    endings: frozenset[str] = ENDINGS,
    stdin: BinaryIO | None = None,
) -> Iterator[Source]:
    """The sources that these arguments name, one by one. Never raises: faults are sources too.

    Args:
        inputs: files, folders, globs (`**` goes into folders), http(s) URLs, `@list.txt`, and `-`
            for standard input: a picture or video, or paths separated by newlines or NUL.
        recursive: also look into folders within folders.
        endings: which files of a folder count.
        stdin: in place of standard input.
    """
    for text in inputs:
        if text == STDIN:
            yield from _from_stream(stdin or sys.stdin.buffer)
        elif _is_list(text):
            yield from _from_list(text)
        elif text.startswith(URLS):
            yield Source(text, url=text)
        else:
            yield from _from_path(text, recursive, endings)


def check_inputs(inputs: Iterable[str], *, recursive: bool = False) -> None:
    """Find what can be found wrong before weights load: missing lists, empty folders and globs.

    Raises:
        UsageError: one of them. (A single file that is missing is that input's own error, later.)
    """
    for text in inputs:
        path = Path(text)
        if _is_list(text) and not Path(text[1:]).is_file():
            raise UsageError(f"no list {text[1:]!r}", "give a file with one path a line")
        if text != STDIN and not path.exists() and glob.has_magic(text) and not _matches(text):
            raise UsageError(f"nothing matches {text!r}", "check the pattern")
        if text != STDIN and path.is_dir():
            first = next(_from_path(text, recursive, ENDINGS))
            if first.error is not None and Path(first.name) == path:
                raise UsageError(f"{text}: {first.error.message}", first.error.hint)


def names_one(text: str) -> bool:
    """Whether an argument can only mean a single input."""
    many = text == STDIN or _is_list(text) or Path(text).is_dir()
    return not many and (Path(text).exists() or text.startswith(URLS) or not glob.has_magic(text))


def _is_list(text: str) -> bool:
    return text.startswith("@") and not Path(text).exists()


def _from_path(text: str, recursive: bool, endings: frozenset[str]) -> Iterator[Source]:
    path = Path(text)
    if path.is_dir():
        yield from _from_folder(path, recursive, endings)
    elif not path.exists() and glob.has_magic(text):
        found = [Path(p) for p in _matches(text)]
        files = [p for p in found if not p.is_dir()]
        for file in files:
            yield Source(str(file), path=file)
        for folder in [] if files else found:  # `holidays-*` that matches folders means their files
            yield from _from_folder(folder, recursive, endings)
    else:
        yield Source(text, path=path)


def _from_folder(folder: Path, recursive: bool, endings: frozenset[str]) -> Iterator[Source]:
    found = False
    for source in _walk(folder, recursive, endings):
        found = True
        yield source
    if not found:
        hint = "" if recursive else "--recursive looks into folders within it"
        yield Source(str(folder), error=InputError("the folder holds no pictures or videos", hint))


def _walk(folder: Path, recursive: bool, endings: frozenset[str]) -> Iterator[Source]:
    """Files in name order, then folders, a folder at a time; hidden ones and links to folders are
    left out."""
    try:
        with os.scandir(folder) as entries:
            shown = [e for e in entries if not e.name.startswith(".")]
    except OSError as error:
        yield Source(str(folder), error=_unreadable(error))
        return
    shown.sort(key=lambda e: e.name)
    for entry in shown:
        if Path(entry.name).suffix.lower() in endings and not entry.is_dir():
            yield Source(str(folder / entry.name), path=folder / entry.name)
    for entry in shown if recursive else []:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name, recursive, endings)


def _from_list(text: str) -> Iterator[Source]:
    try:
        with Path(text[1:]).open("rb") as file:
            yield from _lines(file, b"")
    except OSError as error:
        yield Source(text, error=_unreadable(error))


def _from_stream(stream: BinaryIO) -> Iterator[Source]:
    """A picture or video when it begins like one, else paths."""
    start = b""
    while len(start) < SIGNATURE_BYTES and not _has_text_line(start):
        block = _read_some(stream)
        start += block
        if not block:
            break
    if sniff_kind(start):
        yield Source(STDIN, data=start + stream.read())
    else:
        yield from _lines(stream, start)


def _has_text_line(start: bytes) -> bool:
    """Enough to see that these are paths, before a slow producer sends more of them."""
    line, newline, _ = start.partition(b"\n")
    return bool(newline) and not re.search(rb"[\0-\x08\x0e-\x1f\x7f\xff]", line) and len(line) > 2


def _lines(stream: BinaryIO, start: bytes) -> Iterator[Source]:
    """Paths or URLs separated by newlines, or by NUL if one comes first. Names are kept byte for
    byte (`os.fsdecode`), UTF-8 or not."""
    rest, separator, block = start, b"", start
    while True:
        if not separator and (b"\0" in rest or b"\n" in rest):
            separator = b"\0" if b"\0" in rest else b"\n"
        if separator:
            *lines, rest = rest.split(separator)
            yield from (_line(line) for line in lines if line.strip())
        block = _read_some(stream)
        if not block:
            break
        rest += block
    if rest.strip():
        yield _line(rest)


def _read_some(stream: BinaryIO) -> bytes:
    """What is there, without waiting for a whole block; b"" at the end."""
    read: bytes = getattr(stream, "read1", stream.read)(1 << 16)
    return read


def _line(line: bytes) -> Source:
    text = os.fsdecode(line.removesuffix(b"\r"))
    if text.startswith(URLS):
        return Source(text, url=text)
    return Source(text, path=Path(text))


def _matches(pattern: str) -> list[str]:
    return sorted(glob.iglob(pattern, recursive=True))


def _regular(path: Path) -> Path:
    """A path that can be read to its end: pipes and devices could hang."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(error) from error
    if stat.S_ISDIR(mode):
        raise InputError("is a folder", "name it without a list to read what it holds")
    if not stat.S_ISREG(mode):
        raise InputError("not a regular file", "send it through standard input: hiera ... -")
    return path


def _part(path: Path, offset: int, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise _unreadable(error) from error
    if len(content) < size:
        raise InputError(f"{path} ends within it", "the archive is truncated; fetch it again")
    return content


def _unreadable(error: OSError | ValueError) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(reason.lower(), "check the path")


def _download(url: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "hiera-toolkit"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            data: bytes = response.read(MAX_DOWNLOAD_BYTES + 1)
    except http.client.HTTPException as error:
        raise InputError(f"broken reply ({type(error).__name__})", "try again") from error
    except (OSError, ValueError) as error:  # URLError is an OSError
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise InputError(f"cannot be fetched ({error})", "check the address") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise InputError(f"larger than {MAX_DOWNLOAD_BYTES >> 20} MiB", "download it yourself")
    return data
