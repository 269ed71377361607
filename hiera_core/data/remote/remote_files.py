"""Files at s3://, gs://, hf:// and other places that fsspec knows, with retries and time limits.

A file is read in ranges, each of which is tried several times. Credentials are those of the place's
own library: environment variables, configuration files, the machine's role.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import HieraError, InputError, UsageError, first_line
from .. import tar_files
from ..media_types import ENDINGS, ending_of
from .web_ranges import WebRanges

T = TypeVar("T")
REMOTE = re.compile(r"([a-z][a-z0-9+-]{1,30})://", re.IGNORECASE)
WEB = ("http", "https", "file")  # not for fsspec
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs"}
# Places whose servers are not named by the URL, but by the settings of this machine.
PUBLIC = ("s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss", "memory")
ATTEMPTS = 6  # of each request
FIRST_WAIT_S = 0.25  # before the second attempt; doubled before each further one, up to 8 s
REQUEST_S = 60.0  # maximum duration of a request
RANGE_BYTES = 16 << 20  # of a request
MAX_BYTES = 512 << 20
# What these errors say does not change when the request is repeated.
FINAL = (FileNotFoundError, PermissionError, NotImplementedError, IsADirectoryError)
PAST_END = ("InvalidRange", "416", "Range Not Satisfiable")
log = logging.getLogger("hiera")


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


def is_remote(text: str) -> bool:
    """Return whether a text is a URL of a place that fsspec reads, not of the web."""
    found = REMOTE.match(text)
    return found is not None and found[1].lower() not in WEB


def open_place(url: str, *, public_only: bool = False) -> tuple[Any, str]:
    """Return the file system of a URL, and the path within it. A web server is one whose files are
    read in ranges.

    Args:
        url: The URL.
        public_only: Refuse web servers in private networks.

    Raises:
        UsageError: fsspec or the package of this place is not installed, or nobody knows it.
    """
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return WebRanges(public_only), url
    try:
        import fsspec

        options: dict[str, Any] = {}
        if scheme == "s3":
            timeouts = {"connect_timeout": 10, "read_timeout": 30}
            options = {"config_kwargs": {**timeouts, "retries": {"max_attempts": 1}}}
        found: tuple[Any, str] = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = PACKAGES.get(scheme, "the package of this place")
        raise UsageError(
            f"{scheme}:// needs {package}, which is not installed",
            "pip install 'hiera-toolkit[remote]'" if scheme in ("s3", "gs", "hf") else str(error),
        ) from error
    except ValueError as error:
        raise UsageError(f"{url}: {first_line(error)}", "check the URL") from error
    return found


def check_public(url: str) -> None:
    """Check that the URL of a place cannot lead into a private network: that it names no server,
    and, with `::`, no second URL.

    Raises:
        InputError: It may do so.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in PUBLIC or "::" in url:
        raise InputError(f"{scheme}:// may lead into a private network", "--private-urls allows it")


def fetch_ranges(
    url: str, span: tuple[int, int] | None = None, *, public_only: bool = False
) -> Iterator[bytes]:
    """Yield the content of a file, or of a part of it, range by range.

    Args:
        url: The file.
        span: Offset and size in bytes; None for all of it.
        public_only: Refuse web servers in private networks.

    Raises:
        InputError: The file does not exist, is larger than `MAX_BYTES`, or is shorter than the
            span; or the place does not answer after several attempts.
    """
    with as_input_errors():
        try:
            system, path = open_place(url, public_only=public_only)
        except UsageError as error:
            if isinstance(error.__cause__, ValueError):  # one bad URL must not end a run
                raise InputError(error.message, error.hint) from error
            raise
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


def read_range(system: Any, path: str, start: int, length: int) -> bytes:
    """Return a range of a file: less than `length` bytes at its end, b"" past it."""

    def read() -> bytes:
        try:
            content: bytes = system.cat_file(path, start=start, end=start + length)
        except Exception as error:
            if any(word in str(error) for word in PAST_END):
                return b""
            raise
        return content

    return with_retries(read, path)


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
        system, path = open_place(url)
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
    system, path = open_place(url)
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


# Retries ------------------------------------------------------------------------------------------


def with_retries(function: Callable[[], T], what: str) -> T:
    """Return what a function returns. If it fails, or takes longer than `REQUEST_S`, it is called
    again, after a wait that doubles, with some randomness so that many workers do not come at once.

    Raises:
        Whatever the function raises in the last attempt, or when repeating cannot help.
    """
    wait = FIRST_WAIT_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return within(REQUEST_S, function)
        except FINAL:
            raise
        except Exception as error:
            if attempt == ATTEMPTS:
                raise
            log.debug("%s: %s; attempt %d of %d", what, first_line(error), attempt + 1, ATTEMPTS)
        time.sleep(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, 8.0)
    raise AssertionError  # the loop returns or raises


def within(seconds: float, function: Callable[[], T]) -> T:
    """Return what a function returns, or raise a TimeoutError. A thread that hangs is left behind,
    because nothing can end it."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="remote", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return found[0]


@contextlib.contextmanager
def as_input_errors() -> Iterator[None]:
    """Convert the errors of a place within the block to an InputError."""
    try:
        yield
    except HieraError:
        raise
    except FileNotFoundError as error:
        raise InputError("no such file", "check the URL") from error
    except PermissionError as error:
        raise InputError("access denied", "check the credentials") from error
    except NotImplementedError as error:
        raise InputError(first_line(error), "download it yourself") from error
    except TimeoutError as error:
        hint = "check the network and the credentials"
        raise InputError(f"cannot be fetched ({error})", hint) from error
    except Exception as error:  # libraries of places raise many types
        raise InputError(
            f"cannot be fetched ({first_line(error)[:200]})", "check the URL and the credentials"
        ) from error


def _too_large() -> InputError:
    return InputError(f"larger than {MAX_BYTES >> 20} MiB", "download it yourself")
