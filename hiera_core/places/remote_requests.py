"""Requests to s3://, gs://, hf:// and other places that fsspec knows, with retries and time limits.

Credentials are those of the place's own library: environment variables, configuration files, the
machine's role.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import unquote

from ..errors import HieraError, InputError, UsageError, first_line

T = TypeVar("T")
REMOTE = re.compile(r"([a-z][a-z0-9+-]{1,30})://", re.IGNORECASE)
WEB = ("http", "https", "file")  # not for fsspec
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs"}
ATTEMPTS = 6  # of each request
FIRST_WAIT_S = 0.25  # before the second attempt; doubled before each further one, up to 8 s
REQUEST_S = 60.0  # maximum duration of a request
# What these errors say does not change when the request is repeated.
FINAL = (FileNotFoundError, PermissionError, NotImplementedError, IsADirectoryError, HieraError)
# What places say about a range past the end. Never the bare number: it may be part of a name or of
# the number of a request.
PAST_END = re.compile(r"\bInvalidRange\b|\brange (is )?not satisfiable\b", re.IGNORECASE)
PAST_END_STATUS = 416
STATUS_NAMES = ("status", "status_code", "code")  # of errors of HTTP
log = logging.getLogger("hiera")


def is_remote(text: str) -> bool:
    """Return whether a text is a URL of a place that fsspec reads, not of the web."""
    found = REMOTE.match(text)
    return found is not None and found[1].lower() not in WEB


def is_web(text: str) -> bool:
    """Return whether a text is a URL of the web. `HTTPS://` is one, too."""
    return text.lower().startswith(("http://", "https://"))


def path_of_file_url(text: str) -> str | None:
    """Return the path on this machine that a `file://` URL names; None if this is none.

    `file:///photos/my%20cat.png` -> `/photos/my cat.png`
    """
    scheme, _, rest = text.partition("://")
    host, slash, path = rest.partition("/")
    if scheme.lower() != "file" or host.lower() not in ("", "localhost") or not slash:
        return None
    return "/" + unquote(path, errors="surrogateescape")


def open_place(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path within it.

    Raises:
        UsageError: fsspec or the package of this place is not installed, or nobody knows it.
    """
    scheme = url.partition("://")[0].lower()
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


def read_range(system: Any, path: str, start: int, length: int) -> bytes:
    """Return a range of a file: less than `length` bytes at its end, b"" past it."""

    def read() -> bytes:
        try:
            content: bytes = system.cat_file(path, start=start, end=start + length)
        except Exception as error:
            if _is_past_end(error):
                return b""
            raise
        return content

    return with_retries(read, path)


def _is_past_end(error: Exception) -> bool:
    response = getattr(error, "response", None)
    found = (getattr(one, name, None) for one in (error, response) for name in STATUS_NAMES)
    return PAST_END_STATUS in found or PAST_END.search(str(error)) is not None


# Retries ------------------------------------------------------------------------------------------


def with_retries(function: Callable[[], T], what: str, seconds: float | None = None) -> T:
    """Return what a function returns. If it fails, or takes too long, it is called again, after a
    wait that doubles, with some randomness so that many workers do not come at once.

    Args:
        function: What is called.
        what: Its name for messages.
        seconds: Time that each call may take; None for `REQUEST_S`.

    Raises:
        Whatever the function raises in the last attempt, or when repeating cannot help.
    """
    wait = FIRST_WAIT_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return within(REQUEST_S if seconds is None else seconds, function)
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
