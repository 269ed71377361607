"""Indices of tar files at remote places: s3://, gs://, hf://, https:// and others.

The headers of the tar files are read once, in ranges, and samples are then read at random. Shards
could also be streamed through a buffer in which samples are shuffled. But then the order would
depend on the number of processes and workers, and a run that resumes would have to read again what
it has read before. With an index, every process knows which sample is which: the order of a run is
the same on one process and on several, and it resumes at the very sample.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import IO, Any, TypeVar, cast

from ...errors import InputError, UsageError, first_line
from ...places import remote_requests
from ...places.remote_requests import as_input_errors, is_web, with_retries
from .. import tar_files
from ..remote.web_ranges import open_files
from .index_cache import IndexRequest
from .local_samples import add_shard
from .sample_index import IndexWriter, SampleIndex

S = TypeVar("S")
T = TypeVar("T")
THREADS = 16  # shards that are read at a time
BLOCK = 4 << 20  # bytes of a request for headers that lie close together
SHORT_BLOCK = 64 << 10  # behind a member that is larger than a block
# What a place says about the version of a file.
VERSIONS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "updated", "created", "oid")
WILDCARD = re.compile(r"[*?]")
log = logging.getLogger("hiera")


def index_remote_shards(
    urls: Sequence[str], labelled: bool, *, public_only: bool = False
) -> SampleIndex:
    """Index the members of remote tar files in the format of webdataset.

    Args:
        urls: The tar files, in order.
        labelled: Whether labels are read.
        public_only: Refuse servers in private networks, also when samples are read.

    Raises:
        UsageError: A tar file cannot be read, or a sample lacks its label.
    """

    def build(writer: IndexWriter) -> None:
        log.info("reading the headers of %d remote tar files, which is done once", len(urls))
        read = in_order(lambda url: (url, _read(url, labelled, public_only)), urls)
        for url, samples in read:
            add_shard(writer, url, samples)

    stamp = [*in_order(functools.partial(version_of, public_only=public_only), urls)]
    name = f"{urls[0]} and {len(urls) - 1} more tar files"
    request = IndexRequest("members", name, labelled, stamp, build, always_kept=True, parts=[*urls])
    found = request.open()
    found.public_only = public_only
    return found


def list_shards(pattern: str, *, public_only: bool = False) -> list[str]:
    """Return the URLs that a pattern of tar files stands for, with `{000..099}`, `*` and `?`.

    Args:
        pattern: The pattern.
        public_only: Refuse servers in private networks.

    Raises:
        UsageError: Nothing matches, or the place cannot be listed.
    """
    found: list[str] = []
    for url in tar_files.expand_braces(pattern):
        is_pattern = WILDCARD.search(url) is not None
        found += list_files(url, public_only=public_only) if is_pattern else [url]
    if not found:
        raise UsageError(f"nothing matches {pattern!r}", "check the pattern")
    return found


def list_files(url: str, *, recursive: bool = False, public_only: bool = False) -> list[str]:
    """Return the URLs of the files that match a pattern, or are in a folder, in order.

    Args:
        url: The pattern or folder.
        recursive: Also look into the folders within a folder.
        public_only: Refuse servers in private networks.

    Raises:
        UsageError: The place cannot be listed.
    """
    if is_web(url):
        raise UsageError(
            f"{url}: files of a web server cannot be listed",
            "number them: name-{000..099}.tar; or name one Parquet file",
        )
    with as_usage_errors(url):
        system, path = open_files(url, public_only=public_only)
        if WILDCARD.search(url):
            names = with_retries(lambda: system.glob(path), url)
        else:
            depth = None if recursive else 1
            names = with_retries(lambda: system.find(path, maxdepth=depth), url)
        return [str(system.unstrip_protocol(name)) for name in sorted(names)]


def version_of(url: str, *, public_only: bool = False) -> list[str | int]:
    """Return what changes when a remote file does: its URL, size, and version.

    Args:
        url: The file.
        public_only: Refuse servers in private networks.

    Raises:
        UsageError: It does not exist, or cannot be reached.
    """
    with as_usage_errors(url):
        system, path = open_files(url, public_only=public_only)
        info: dict[str, Any] = with_retries(lambda: system.info(path), url)
        version = next((str(info[name]) for name in VERSIONS if info.get(name)), "")
        return [url, int(info.get("size") or 0), version]


def in_order(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Yield the results of a function for the items, in order. Threads compute a few ahead."""
    waiting: deque[Future[T]] = deque()
    left = iter(items)
    with ThreadPoolExecutor(THREADS, "remote") as pool:
        try:
            waiting += (pool.submit(function, item) for item in islice(left, 2 * THREADS))
            while waiting:
                yield waiting.popleft().result()
                waiting += (pool.submit(function, item) for item in islice(left, 1))
        finally:
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def as_usage_errors(url: str) -> Iterator[None]:
    """Convert the errors of a place within the block to a UsageError about a URL."""
    try:
        with as_input_errors():
            yield
    except InputError as error:
        raise UsageError(f"{url}: {error.message}", error.hint) from error


def _read(url: str, labelled: bool, public_only: bool) -> list[tuple[tar_files.Member, str | None]]:
    with as_usage_errors(url):
        system, path = open_files(url, public_only=public_only)
        try:
            return tar_files.read_samples(cast(IO[bytes], RangeFile(system, path)), labelled)
        except tarfile.TarError as error:
            reason = first_line(error).lower()
            raise InputError(reason, "the tar file is damaged or compressed") from error


class RangeFile(io.RawIOBase):
    """A remote file, of which blocks are read when they are asked for, each with retries.

    Headers of small members come many in a block. Behind a large member, a short block is enough.

    Args:
        system, path: See `open_place`.
        size: Its size in bytes; None if nobody seeks from its end.
    """

    def __init__(self, system: Any, path: str, size: int | None = None) -> None:
        self._system, self._path, self._size = system, path, size
        self._position, self._start, self._block = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            assert self._size is not None
            offset += self._size
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return as many bytes, or less at the end of the file."""
        found = bytearray()
        while len(found) < size:
            at = self._position - self._start
            if not 0 <= at < len(self._block):
                is_near = 0 <= at <= len(self._block) + BLOCK
                length = BLOCK if is_near else SHORT_BLOCK
                self._start, at = self._position, 0
                self._block = remote_requests.read_range(
                    self._system, self._path, self._position, length
                )
                if not self._block:
                    break
            part = self._block[at : at + size - len(found)]
            found += part
            self._position += len(part)
        return bytes(found)
