"""Fetch an input by its URL: a small one into memory, a large one into a temporary file. A table of
inputs always goes to a file.

Many workers fetch at once, and a video stays open until its turn. So memory holds at most
`IN_MEMORY_BYTES` of each. Members of tar files are kept in the same way.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from ..errors import InputError
from ..places.remote_requests import is_remote
from ..weights.fetch import FetchError, PrivateNetworkError, Response, open_url
from .remote import remote_files
from .remote.web_ranges import PRIVATE_HINT

T = TypeVar("T")
MAX_DOWNLOAD_BYTES = 512 << 20
IN_MEMORY_BYTES = 16 << 20
ATTEMPTS = 4  # of a URL whose server is busy
FIRST_WAIT_S = 0.5  # before the second attempt; doubled before each further one
PASSING = (429, 500, 502, 503, 504)  # codes of HTTP that say so
TOTAL_S = 600.0  # maximum duration of a download; one that is slower than 1 KiB/s ends sooner
OPEN_FILES = Path("/proc/self/fd")  # Linux: paths of the files that this process has open


def fetch_content(
    url: str, span: tuple[int, int] | None = None, *, public_only: bool = False
) -> Path | bytes:
    """Fetch a URL of the web, or of a place that `remote_files` reads. What fails for a reason that
    may pass is tried again.

    Args:
        url: The URL.
        span: Offset and size in bytes of a part, for members of remote tar files.
        public_only: Refuse servers in private networks.

    Returns:
        The content, or the path of a temporary file. The file is removed when nothing refers to
        the returned object any more.

    Raises:
        InputError: The server does not answer, is too slow, is in a private network, or redirects
            into one; or the file is incomplete or too large; or the package of a remote place is
            not installed.
    """
    if is_remote(url) or span is not None:
        return keep_content(remote_files.fetch_ranges(url, span, public_only=public_only))

    def fetch() -> Path | bytes:
        with open_url(url, total_s=TOTAL_S, public_only=public_only) as response:
            return keep_content(_checked(response, MAX_DOWNLOAD_BYTES))

    return _with_attempts(fetch)


def fetch_file(url: str) -> Path:
    """Fetch a file of any size, see `fetch_content`, and return the path of a temporary file. It is
    removed when nothing refers to the returned object any more.

    Raises:
        InputError: See `fetch_content`; or the file changes while it is fetched.
    """
    if is_remote(url):
        return keep_file(remote_files.fetch_whole(url))

    def fetch() -> Path:
        with open_url(url) as response:
            return keep_file(_checked(response, None))

    return _with_attempts(fetch)


def _with_attempts(fetch: Callable[[], T]) -> T:
    """Return what a function returns that fetches a URL of the web. It is called again if the
    server is busy."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return fetch()
        except FetchError as error:
            if attempt == ATTEMPTS or error.status not in PASSING:
                is_private = isinstance(error, PrivateNetworkError)
                hint = PRIVATE_HINT if is_private else "check the address"
                raise InputError(f"cannot be fetched ({error.reason})", hint) from error
        time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
    raise AssertionError  # the loop returns or raises


def keep_content(chunks: Iterable[bytes]) -> Path | bytes:
    """Return content that arrives in pieces, or the path of a temporary file; see `fetch_content`.

    Raises:
        InputError: It cannot be stored.
    """
    with _storing(), tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES) as spool:
        for chunk in chunks:
            spool.write(chunk)
        size = spool.tell()
        spool.seek(0)
        return spool.read() if size <= IN_MEMORY_BYTES else _keep(spool)


def keep_file(chunks: Iterable[bytes]) -> Path:
    """Return the path of a temporary file with content that arrives in pieces; see `fetch_file`.

    Raises:
        InputError: It cannot be stored.
    """
    with _storing(), tempfile.TemporaryFile() as file:
        for chunk in chunks:
            file.write(chunk)
        file.seek(0)
        return _keep(file)


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "free some space, or set TMPDIR to another folder"
        raise InputError(f"cannot be stored ({error.strerror or error})", hint) from error


def _checked(response: Response, limit: int | None) -> Iterator[bytes]:
    """Yield the content of a response, and check its length.

    Args:
        response: The response.
        limit: Maximum number of bytes, if there is one.
    """
    size, most = 0, limit if limit is not None else sys.maxsize
    too_large = InputError(f"larger than {most >> 20} MiB", "download it yourself")
    if (response.length or 0) > most:
        raise too_large
    for chunk in response.chunks():
        size += len(chunk)
        if size > most:
            raise too_large
        yield chunk
    if response.length not in (None, size):
        raise FetchError(f"{size} of {response.length} bytes arrived")


class _TemporaryPath(type(Path())):  # type: ignore[misc]  # the class for this system
    """Path of a temporary file that goes when this object does."""


def _keep(spool: IO[bytes]) -> Path:
    """Return a path of an open temporary file, which would otherwise be removed when it is closed.

    On Linux this file has no name, so that nothing remains even if the process is killed.
    """
    if OPEN_FILES.is_dir():
        descriptor = os.dup(spool.fileno())
        path = _TemporaryPath(OPEN_FILES / str(descriptor))
        weakref.finalize(path, os.close, descriptor)
        return path
    with tempfile.NamedTemporaryFile(prefix="hiera-", delete=False) as named:
        path = _TemporaryPath(named.name)
        weakref.finalize(path, _remove, named.name)
        shutil.copyfileobj(spool, named)
    return path


def _remove(name: str) -> None:
    with contextlib.suppress(OSError):  # on Windows, a reader may still have it open
        Path(name).unlink()
