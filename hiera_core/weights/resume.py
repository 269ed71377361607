"""Download a file from a URL, and continue where an earlier attempt stopped.

A partial file can only be continued with bytes of the same version. So NAME.partial.json beside it
holds the URL, the size, and what tells versions apart: a strong ETag. A date of the last change
does not, because two versions can have the same. The server is asked for the rest on the condition
that the version is still this one (If-Range), and its answer is checked too, because some servers
ignore the condition. In every case of doubt the download starts over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from .fetch import FetchError, Response, open_url

CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True)
class Version:
    """One version of the file at a URL, as the server describes it.

    Args:
        url: The URL.
        etag: Its ETag, if it is a strong one: equal ETags mean equal bytes.
        size: Size in bytes.
    """

    url: str
    etag: str | None = None
    size: int | None = None


class BrokenOff(FetchError):
    """A transfer that ended before the file was complete. It can be continued."""


def download(
    url: str,
    partial: Path,
    on_start: Callable[[], None] = lambda: None,
    *,
    public_only: bool = False,
) -> Version:
    """Download a URL to `partial`, or complete it. Progress goes to stderr.

    Args:
        url: The http(s) URL.
        partial: Path of the file. No other process may write to it.
        on_start: Called when the server has accepted the request.
        public_only: Refuse servers in private networks.

    Returns:
        The version that the file holds.

    Raises:
        FetchError: The file cannot be fetched.
        OSError, OutputError: It cannot be written.
    """
    started = _started_version(url, partial)
    if started is not None:
        with contextlib.suppress(_CannotContinue):
            return _transfer(url, partial, started, on_start, public_only)
    remove(partial)
    return _transfer(url, partial, None, on_start, public_only)


def remove(partial: Path) -> None:
    """Remove a partial file and the file that describes it."""
    partial.unlink(missing_ok=True)
    _description(partial).unlink(missing_ok=True)


class _CannotContinue(Exception):
    """The server does not continue the version that the partial file was begun with."""


def _transfer(
    url: str,
    partial: Path,
    started: Version | None,
    on_start: Callable[[], None],
    public_only: bool,
) -> Version:
    """Download the whole file, or the rest of the version `started`."""
    offset = partial.stat().st_size if started else 0
    headers = {}
    if started is not None:
        headers = {"Range": f"bytes={offset}-", "If-Range": str(started.etag)}
    try:
        with open_url(url, headers, public_only=public_only) as response:
            version = _version_of(url, response)
            if response.status == 206:
                if started is None or not _continues(response, version, started, offset):
                    raise _CannotContinue
                version = started
            elif response.status == 200:  # the whole file, of this version or another
                offset = 0
                remove(partial)
                _write_description(partial, version)
            else:
                raise FetchError(f"unexpected answer {response.status}", response.status)
            on_start()
            _append(response, partial, offset, version)
    except FetchError as error:
        if error.status == 416 and started is not None:  # the file has become shorter
            raise _CannotContinue from error
        raise
    return version


def _append(response: Response, partial: Path, offset: int, version: Version) -> None:
    """Write the content of a response to the partial file, from `offset` on."""
    with (
        partial.open("ab" if offset else "wb") as file,
        _progress_bar(partial.stem, offset, version.size) as advance,
    ):
        for chunk in response.chunks():
            file.write(chunk)
            advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if version.size is not None and size != version.size:
        raise BrokenOff(f"{size} of {version.size} bytes arrived")


def _continues(response: Response, version: Version, started: Version, offset: int) -> bool:
    """Return whether a 206 response continues the version `started` at `offset`."""
    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if match is None or version.etag != started.etag:
        return False
    start, end, size = map(int, match.groups())
    whole = start == offset and end == size - 1 and size == started.size
    return whole and response.length in (None, size - offset)


def _started_version(url: str, partial: Path) -> Version | None:
    """Return the version that the partial file was begun with, if it can be continued."""
    try:
        fields = json.loads(_description(partial).read_text(encoding="utf-8"))
        version = Version(**fields)
        offset = partial.stat().st_size
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    if version.url != url or not isinstance(version.etag, str) or type(version.size) is not int:
        return None
    return version if 0 < offset < version.size else None


def _version_of(url: str, response: Response) -> Version:
    etag = response.headers.get("ETag")
    strong = etag is not None and etag.startswith('"')  # W/"..." says only that it looks alike
    return Version(url, etag if strong else None, response.length)


def _description(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _write_description(partial: Path, version: Version) -> None:
    with atomic_file(_description(partial)) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(version)), encoding="utf-8")


@contextlib.contextmanager
def _progress_bar(name: str, done: int, total: int | None) -> Iterator[Callable[[int], Any]]:
    """Show a progress bar, and yield a function that advances it by a number of bytes.

    Nothing is shown if stderr is not a terminal, or if the hub's progress bars are disabled.
    """
    from huggingface_hub.utils import are_progress_bars_disabled

    if not sys.stderr.isatty() or are_progress_bars_disabled():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda count: progress.advance(task, count)
