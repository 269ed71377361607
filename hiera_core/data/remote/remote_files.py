"""Inputs at s3://, gs://, hf:// and other places that fsspec knows. A file is read in ranges."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import InputError, UsageError, first_line
from ...places.remote_requests import as_input_errors, read_range, with_retries
from .. import tar_files
from ..media_types import ENDINGS, ending_of
from .web_ranges import open_files

RANGE_BYTES = 16 << 20  # of a request
MAX_BYTES = 512 << 20
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "updated")


@dataclass(frozen=True)
class RemoteFile:
    """An input at a remote place.

    Args:
        name: Its URL, and within a tar file its path.
        url: The URL to read.
        span: Offset and size within it, for a member of a tar file.
        short_name: Its path within the folder or tar file that the user named.
        error: Why it cannot be read, if that is known.
    """

    name: str
    url: str
    span: tuple[int, int] | None = None
    short_name: str = ""
    error: InputError | None = None


def fetch_ranges(
    url: str, span: tuple[int, int] | None = None, *, public_only: bool = False
) -> Iterator[bytes]:
    """Yield the content of a file, or of a part of it, range by range.

    Args:
        url: The file.
        span: Offset and size in bytes; None for all of it.
        public_only: Refuse servers in private networks.

    Raises:
        InputError: The file does not exist, is larger than `MAX_BYTES`, or is shorter than the
            span; the place does not answer after several attempts, or its package is not installed.
    """
    with as_input_errors():
        try:
            system, path = open_files(url, public_only=public_only)
        except UsageError as error:  # a bad URL or a missing package must not end a run
            raise InputError(error.message, error.hint) from error
        offset, size = span or (0, MAX_BYTES + 1)
        if span is not None and size > MAX_BYTES:
            raise _too_large()
        done = 0
        while done < size:
            length = min(RANGE_BYTES, size - done)
            block = read_range(system, path, offset + done, length)
            done += len(block)
            if done > MAX_BYTES:
                raise _too_large()
            if block:
                yield block
            if len(block) < length:
                break
    if span is not None and done < size:
        raise InputError(f"{url} ends within this file", "the archive is truncated; get it again")


def fetch_whole(url: str) -> Iterator[bytes]:
    """Yield the content of a file of any size, range by range.

    Raises:
        InputError: See `fetch_ranges`; or the file changes meanwhile.
    """
    with as_input_errors():
        system, path = open_files(url)
        before = _info(system, path)
        size, done = int(before["size"]), 0
        while done < size:
            block = read_range(system, path, done, min(RANGE_BYTES, size - done))
            if not block:
                break
            done += len(block)
            yield block
        now = _info(system, path)
        if done < size or any(before.get(key) != now.get(key) for key in ("size", *VERSIONS)):
            raise InputError("has changed while it was fetched", "run again")


def _info(system: Any, path: str) -> dict[str, Any]:
    def found() -> dict[str, Any]:
        system.invalidate_cache()
        info: dict[str, Any] = system.info(path)
        return info

    info = with_retries(found, path)
    if info.get("type") == "directory":
        raise InputError("is a folder", "name a file")
    return info


def list_inputs(
    url: str, recursive: bool, passed_over: Counter[str] | None = None
) -> Iterator[RemoteFile]:
    """Yield the inputs that a URL names: a file, the files of a folder or of a pattern, or the
    members of a tar file. An input that cannot be listed has an error.

    Args:
        url: The URL; a folder ends with `/`.
        recursive: Also look into the folders within a folder.
        passed_over: Counts the other files in folders and tar files, by extension.
    """
    try:
        with as_input_errors():
            yield from _list(url, recursive, passed_over)
    except InputError as error:
        yield RemoteFile(url, url, error=error)


def _list(url: str, recursive: bool, passed_over: Counter[str] | None) -> Iterator[RemoteFile]:
    if re.search(r"[*?]", url) or url.endswith("/"):
        system, path = open_files(url)
        if url.endswith("/"):
            base = path.rstrip("/")
            listed = _find(system, base, recursive)
        else:
            base = path.rpartition("/")[0]
            listed = sorted(with_retries(lambda: system.glob(path), url))
        files = [p for p in listed if ending_of(p) in ENDINGS]
        if passed_over is not None:
            others = (p for p in listed if ending_of(p) not in ENDINGS and not p.endswith("/"))
            passed_over.update(ending_of(p) or "without extension" for p in others)
        for found in files:
            full = system.unstrip_protocol(found)
            yield RemoteFile(full, full, short_name=found.removeprefix(base).lstrip("/"))
        if not files:
            raise InputError("holds no pictures or videos", "check the URL, or add --recursive")
    elif url.lower().endswith(".tar"):
        yield from _members(url, passed_over)
    else:
        yield RemoteFile(url, url)


def _find(system: Any, base: str, recursive: bool) -> list[str]:
    depth = None if recursive else 1
    found: list[str] = with_retries(lambda: system.find(base, maxdepth=depth), base)
    return sorted(found)


def _members(url: str, passed_over: Counter[str] | None) -> Iterator[RemoteFile]:
    system, path = open_files(url)
    stem = path.rpartition("/")[2].removesuffix(".tar")
    is_empty = True
    try:
        with with_retries(lambda: system.open(path, "rb"), url) as file:
            for member in tar_files.read_members(file, passed_over):
                is_empty = False
                error = None
                if member.is_sparse:
                    error = InputError(tar_files.SPARSE, tar_files.SPARSE_HINT)
                span = (member.offset, member.size)
                yield RemoteFile(f"{url}/{member.name}", url, span, f"{stem}/{member.name}", error)
    except tarfile.TarError as error:
        raise InputError(
            first_line(error).lower(), "the tar file is damaged or compressed"
        ) from error
    if is_empty:
        raise InputError("the tar file holds no pictures or videos")


def _too_large() -> InputError:
    return InputError(f"larger than {MAX_BYTES >> 20} MiB", "download it yourself")
