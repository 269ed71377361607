"""Turn what a user names (files, folders, globs, lists, URLs, stdin) into a stream of sources.

Sources come in order and one at a time, so a long list needs no more memory than a short one. No
image is opened here. If a list or a folder cannot be read, a source with an error takes its place,
so that every input keeps its position.
"""

from __future__ import annotations

import contextlib
import glob
import re
import stat
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import InputError, UsageError, first_line
from ..places.remote_requests import is_remote, is_web, path_of_file_url
from . import folders, tar_files
from .list_files import is_table, read_paths
from .lists.path_lines import check_text, read_available, read_names
from .media_types import (
    ENDINGS,
    SIGNATURE_BYTES,
    VIDEO_ENDINGS,
    as_input_error,
    ending_of,
    sniff_kind,
)
from .remote.remote_files import list_inputs
from .url_content import fetch_content, keep_content

if TYPE_CHECKING:
    import numpy as np
    import torch

STDIN = "-"
# Unlike these, brackets are common in the names of files: `photo[1].jpg`.
WILDCARD = re.compile(r"[*?]")
MAX_MEMBER_BYTES = 512 << 20  # of a tar file
LINE_HINT = "a list has one path per line, relative to the current folder"


@dataclass(frozen=True)
class Source:
    """One input: its name, and one of `path`, `data`, `url`, `pixels` or `error`.

    Args:
        name: The input as the user named it.
        path: A file.
        data: The content itself.
        url: A URL of the web or a remote place, fetched when `content` is called.
        span: Offset and size in bytes within `path` or `url`, for a member of a tar file.
        pixels: An image, uint8 [height, width, 3], or a clip, uint8 [frames, height, width, 3]; a
            tensor if it lies on a device.
        error: Why this input cannot be read, if that is known already. `content` raises it.
        short_name: Its path within the folder or tar file that the user named. If it is empty, the
            short name is the last part of `name`.
        output_stem: Where its output files are; see `OutputNames`.
        in_list: Whether it is a line of a list or of standard input.
        id: What a manifest calls this input.
        position: Its number among all inputs of a run, if this is not its number in the stream.
        public_only: Whether a URL must not lead into a private network.
    """

    name: str
    path: Path | None = None
    data: bytes | None = None
    url: str | None = None
    span: tuple[int, int] | None = None
    pixels: np.ndarray | torch.Tensor | None = None
    error: InputError | None = None
    short_name: str = ""
    output_stem: str = ""
    in_list: bool = False
    id: str | int | None = None
    position: int | None = None
    public_only: bool = False

    def content(self) -> Path | bytes:
        """Return the path to read, or the bytes. A URL is fetched now, so call it in a worker. For
        pixels in memory, see `pixels`.

        Raises:
            InputError: The file does not exist, or the URL cannot be fetched.
        """
        if self.error is not None:
            raise self.error
        if self.url is not None:
            return fetch_content(self.url, self.span, public_only=self.public_only)
        if self.data is not None:
            return self.data
        assert self.path is not None
        if self.span is None:
            return _check_regular_file(self.path, LINE_HINT if self.in_list else "check the path")
        return _read_span(self.path, *self.span)

    @property
    def is_named_like_video(self) -> bool:
        """Whether this is a video by its name, or by its content where that is in memory.

        Nothing is opened for this.
        """
        if self.path is None or self.span is not None:
            return self.looks_like_video
        return ending_of(self.name) in VIDEO_ENDINGS

    @property
    def looks_like_video(self) -> bool:
        """Whether this seems to be a video, by its first bytes or, failing that, by its name.

        Nothing is fetched for this.
        """
        if self.pixels is not None:
            return self.pixels.ndim == 4
        kind = None
        with contextlib.suppress(OSError):
            if self.data is not None:
                kind = sniff_kind(self.data[:SIGNATURE_BYTES])
            elif self.path is not None and self.span is None and self.path.is_file():
                with self.path.open("rb") as file:
                    kind = sniff_kind(file.read(SIGNATURE_BYTES))
        if kind is not None:
            return kind == "video"
        ending = ending_of(self.name)
        # A URL without a known extension can be either. It counts as a video, which costs more.
        return ending in VIDEO_ENDINGS or (self.url is not None and ending not in ENDINGS)


def expand(
    inputs: Iterable[str],
    *,
    recursive: bool = False,
    endings: frozenset[str] = ENDINGS,
    passed_over: Counter[str] | None = None,
    stdin: BinaryIO | None = None,
    literally: bool = False,
    ahead: bool = False,
) -> Iterator[Source]:
    """Yield the sources that the inputs name, one by one.

    This never raises: whatever cannot be read becomes a source with an error.

    Args:
        inputs: Files, folders, globs (`**` matches any number of folders), http(s) URLs, tar files
            (`00000.tar`, `shard-{000..009}.tar`), `@list.txt`, `file://` URLs of any of these, and
            `-` for standard input, which is an image or video, or paths separated by newlines or
            NUL.
        recursive: Also look into the folders within a folder.
        endings: Extensions of the files in a folder that are inputs.
        passed_over: Counts the other files in folders, by extension; see `folders.find_files`.
        stdin: Stream to read in place of standard input.
        literally: Take every input for a file or folder, whatever characters are in its name.
        ahead: Leave out the inputs that cannot be listed twice at little cost: those of streams
            (standard input and pipes), and the members of tar files.
    """
    options = _FolderOptions(recursive, endings, passed_over)
    for text in map(_localised, inputs):
        if ahead and (text == STDIN or is_tar(text) or (_is_list(text) and not _is_file(text[1:]))):
            continue
        if literally:
            yield from _from_file_or_folder(text, options)
        elif text == STDIN:
            yield from _from_stream(stdin or sys.stdin.buffer)
        elif _is_list(text):
            yield from _from_list(text)
        elif is_web(text):
            yield Source(text, url=text)
        elif is_remote(text):
            for f in list_inputs(text, recursive, passed_over):
                yield Source(f.name, url=f.url, span=f.span, error=f.error, short_name=f.short_name)
        elif (path := path_of_file_url(text)) is not None:
            yield Source(text, path=Path(path))
        else:
            yield from _from_path(text, options)


def check_inputs(inputs: Iterable[str], *, recursive: bool = False, expand: bool = True) -> None:
    """Check lists, folders and globs, so that a mistake is reported before weights are loaded.

    Raises:
        UsageError: A list is missing, a folder is empty, a glob matches nothing, a pattern of tar
            files stands for too many, or an input is "". A single file that is missing is not an
            error here: later, that input alone fails.
    """
    for text in inputs:
        if not text:  # a shell variable that is not set; as a path, it would be this folder
            raise UsageError("an input is an empty string", "give a file, folder, glob or URL")
        text = _localised(text) if expand else text
        if expand and (text == STDIN or is_web(text) or is_remote(text)):
            continue
        if expand and _is_list(text) and not _is_file(text[1:]):
            raise UsageError(f"no list {text[1:]!r}", "give a file with one path per line")
        if expand and WILDCARD.search(text) and not _exists(text) and not _glob(text):
            raise UsageError(f"nothing matches {text!r}", "check the pattern")
        if expand and is_tar(text) and not _exists(text):
            tar_files.expand_braces(text)
        if is_folder(text):
            first = next(_from_path(text, _FolderOptions(recursive)))
            if first.error is not None and Path(first.name) == Path(text):
                raise UsageError(f"{text}: {first.error.message}", first.error.hint)


def can_be_listed_twice(text: str) -> bool:
    """Return whether an input can be expanded again: standard input, and a list that is a pipe,
    can be read only once."""
    text = _localised(text)
    return text != STDIN and not (_is_list(text) and not _is_file(text[1:]))


def is_tar(text: str | Path) -> bool:
    """Return whether a name is that of a tar file, or a pattern of several."""
    return Path(text).suffix.lower() == ".tar" and not is_folder(text)


def names_one(text: str) -> bool:
    """Return whether an argument can only name a single input."""
    text = path_of_file_url(text) or _localised(text)
    many = text == STDIN or _is_list(text) or is_folder(text) or is_tar(text)
    many = many or (is_remote(text) and (text.endswith("/") or WILDCARD.search(text) is not None))
    return not many and (_exists(text) or is_web(text) or not glob.has_magic(text))


def _localised(text: str) -> str:
    """Return the path that a `file://` URL names if it is a folder, a pattern or tar files, and
    `@path` for the list `@file://...`; other text as it is."""
    mark = "@" if text.startswith("@") else ""
    path = path_of_file_url(text.removeprefix(mark))
    if path is None:
        return text
    is_pattern = glob.has_magic(path) and not _exists(path)
    return mark + path if mark or is_pattern or is_folder(path) or is_tar(path) else text


# Files, folders and globs -------------------------------------------------------------------------


@dataclass(frozen=True)
class _FolderOptions:
    """Which files of a folder are inputs; see `expand`."""

    recursive: bool = False
    endings: frozenset[str] = ENDINGS
    passed_over: Counter[str] | None = None


def _from_path(text: str, options: _FolderOptions) -> Iterator[Source]:
    path = Path(text)
    if is_tar(text):
        try:
            shards = [text] if _exists(text) else tar_files.expand_braces(text)
        except UsageError as error:
            yield Source(text, error=InputError(error.message, error.hint))
            return
        for shard in shards:
            is_pattern = not _exists(shard) and glob.has_magic(shard)
            for name in _glob(shard) if is_pattern else [shard]:
                yield from _from_tar(name, options)
    elif is_folder(path):
        yield from _from_folder(path, options)
    elif (
        not _exists(path)
        and glob.has_magic(text)
        and ((found := _glob(text)) or WILDCARD.search(text))
    ):
        matches = [Path(p) for p in found]
        files = [p for p in matches if not is_folder(p)]
        for file in files:
            yield Source(str(file), path=file)
        # A pattern such as `holidays-*` that matches only folders means the files in them.
        for folder in [] if files else matches:
            yield from _from_folder(folder, options)
    else:
        yield Source(text, path=path)


def _from_tar(text: str, options: _FolderOptions) -> Iterator[Source]:
    """Yield the images and videos in a tar file. If it cannot be read, an error ends them."""
    path, is_empty = Path(text), True
    try:
        for member in tar_files.read_members(_check_regular_file(path), options.passed_over):
            is_empty, name = False, f"{text}/{member.name}"
            error = None
            if member.is_sparse:
                error = InputError(tar_files.SPARSE, tar_files.SPARSE_HINT)
            yield Source(
                name,
                path=path,
                span=(member.offset, member.size),
                error=error,
                short_name=f"{path.stem}/{member.name}",
            )
    except InputError as error:
        yield Source(text, error=error)
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        yield Source(
            text, error=InputError(reason.lower(), "the tar file is damaged or compressed")
        )
    else:
        if is_empty:
            yield Source(text, error=InputError("the tar file holds no pictures or videos"))


def _from_file_or_folder(text: str, options: _FolderOptions) -> Iterator[Source]:
    if is_tar(text) and _exists(text):
        yield from _from_tar(text, options)
        return
    if is_folder(text):
        yield from _from_folder(Path(text), options)
        return
    is_expression = text == STDIN or text[:1] == "@" or is_web(text) or glob.has_magic(text)
    if is_expression and not _exists(text):
        hint = "expand=True reads globs, URLs, lists and standard input"
        yield Source(text, error=InputError("no such file or directory", hint))
        return
    yield Source(text, path=Path(text))


def _from_folder(folder: Path, options: _FolderOptions) -> Iterator[Source]:
    """Yield the inputs in a folder, or a source with an error if it holds none."""
    unreadable: list[Source] = []

    def note(path: Path, error: OSError) -> None:
        unreadable.append(Source(str(path), error=as_input_error(error)))

    is_empty, passed_over = True, Counter[str]()
    files = folders.find_files(
        folder,
        recursive=options.recursive,
        endings=options.endings,
        passed_over=passed_over,
        on_error=note,
    )
    for path in files:
        yield from _drain(unreadable)
        is_empty = False
        yield Source(str(path), path=path, short_name=str(path.relative_to(folder)))
    is_empty &= not unreadable
    yield from _drain(unreadable)
    if options.passed_over is not None:
        options.passed_over.update(passed_over)
    if is_empty:
        inner = folders.count_folders(folder)
        hint = "--recursive looks into folders within it" if inner and not options.recursive else ""
        if passed_over:
            hint = f"it holds {folders.describe(passed_over)}{'; ' if hint else ''}{hint}"
        elif not inner:
            hint = "the folder is empty"
        yield Source(str(folder), error=InputError("the folder holds no pictures or videos", hint))


def _drain(sources: list[Source]) -> Iterator[Source]:
    """Yield the sources, and remove them from the list."""
    while sources:
        yield sources.pop(0)


def _glob(pattern: str) -> list[str]:
    with contextlib.suppress(OSError, ValueError):  # a folder that cannot be entered, a NUL
        return sorted(glob.iglob(pattern, recursive=True))
    return []


# A name that the system refuses, because it is too long or lies in a folder that cannot be entered,
# names nothing here. Reading it then gives the reason, and the other inputs are not affected.


def _exists(path: str | Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return Path(path).exists()
    return False


def _is_file(path: str | Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return Path(path).is_file()
    return False


def is_folder(path: str | Path) -> bool:
    """Return whether there is a folder at a path that the system allows."""
    with contextlib.suppress(OSError, ValueError):
        return Path(path).is_dir()
    return False


# Lists and standard input -------------------------------------------------------------------------


def _is_list(text: str) -> bool:
    return text.startswith("@") and not _exists(text)


def _from_list(text: str) -> Iterator[Source]:
    path = Path(text[1:])
    try:
        if is_table(path):
            for name in read_paths(_check_regular_file(path)):
                yield from_name(name, in_list=True)
            return
        with path.open("rb") as file:
            yield from _from_lines(file, check_text(read_available(file)), text)
    except UsageError as error:
        yield Source(text, error=InputError(error.message, error.hint))
    except InputError as error:
        yield Source(text, error=error)
    except (OSError, ValueError) as error:
        yield Source(text, error=as_input_error(error))


def _from_stream(stream: BinaryIO) -> Iterator[Source]:
    """Yield the stream itself if it begins like an image or video, else the paths in it."""
    start = b""
    while len(start) < SIGNATURE_BYTES and not _begins_with_text_line(start):
        block = read_available(stream)
        start += block
        if not block:
            break
    if sniff_kind(start):
        yield Source(STDIN, data=start + stream.read())
    else:
        yield from _from_lines(stream, start, STDIN)


def _begins_with_text_line(start: bytes) -> bool:
    """Return whether these bytes begin with a line of text, and so must be paths.

    So the first path is processed before a slow producer sends the next one.
    """
    line, newline, _ = start.partition(b"\n")
    return bool(newline) and not re.search(rb"[\0-\x08\x0e-\x1f\x7f\xff]", line) and len(line) > 2


def _from_lines(stream: BinaryIO, start: bytes, name: str) -> Iterator[Source]:
    """Yield the sources that a stream names, and an error if it is no text; see `read_names`.

    Args:
        stream: The stream, read up to the end of `start`.
        start: The bytes that have been read from it before.
        name: The list, for an error about it.
    """
    try:
        for found in read_names(stream, start):
            yield from_name(found, in_list=True)
    except InputError as error:
        yield Source(name, error=error)


def from_name(text: str, *, in_list: bool = False) -> Source:
    """Return the source of a path or URL: no glob, folder or list. `in_list`: see `Source`."""
    if is_web(text) or is_remote(text):
        return Source(text, url=text)
    return Source(text, path=Path(path_of_file_url(text) or text), in_list=in_list)


# Content ------------------------------------------------------------------------------------------


def _check_regular_file(path: Path, hint: str = "check the path") -> Path:
    """Return the path if it is a regular file. Reading a pipe or a device could hang.

    Args:
        path: The path.
        hint: What to do if there is no such file.

    Raises:
        InputError: There is no such file, or it is not a regular file.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(as_input_error(error).message, hint) from error
    if stat.S_ISDIR(mode):
        raise InputError("is a folder", "name the folder itself as an input, not in a list")
    if not stat.S_ISREG(mode):
        raise InputError("not a regular file", "send it through standard input: hiera ... -")
    return path


def _read_span(path: Path, offset: int, size: int) -> Path | bytes:
    """Return `size` bytes of a file, starting at `offset`; see `keep_content`.

    Raises:
        InputError: The file cannot be read, or is shorter; or the span is too large.
    """
    if size > MAX_MEMBER_BYTES:
        raise InputError(
            f"larger than {MAX_MEMBER_BYTES >> 20} MiB", "extract it and give its path"
        )
    return keep_content(_blocks(path, offset, size))


def _blocks(path: Path, offset: int, size: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while size and (block := file.read(min(size, 1 << 20))):
                size -= len(block)
                yield block
    except OSError as error:
        raise as_input_error(error) from error
    if size:
        raise InputError(f"{path} ends within this file", "the archive is truncated; get it again")
