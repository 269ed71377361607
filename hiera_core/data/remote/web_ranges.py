"""Parts of files at http(s) servers, in the way of a file system of fsspec."""

from __future__ import annotations

import re
from typing import Any

from ...places import remote_requests
from ...weights.fetch import FetchError, open_url

REQUEST_S = 60.0  # maximum duration of a request
NO_PARTS = "the server sends no parts of files (HTTP ranges)"


def open_files(url: str, *, public_only: bool = False) -> tuple[Any, str]:
    """Return the file system of a URL, and the path within it. A web server is one whose files are
    read in ranges.

    Args:
        url: The URL.
        public_only: Refuse web servers in private networks.

    Raises:
        UsageError: See `open_place`.
    """
    if url.partition("://")[0].lower() in ("http", "https"):
        return WebRanges(public_only), url
    return remote_requests.open_place(url)


class WebRanges:
    """Files of web servers by their URLs, read in ranges.

    Args:
        public_only: Refuse servers in private networks.
    """

    def __init__(self, public_only: bool = False) -> None:
        self.public_only = public_only

    def cat_file(self, url: str, start: int, end: int) -> bytes:
        """Return a part of a file; b"" behind its end.

        Raises:
            FileNotFoundError, PermissionError: The server has no such file, or refuses it.
            NotImplementedError: The server sends only whole files.
            OSError: It cannot be fetched.
        """
        content, _ = self._fetch(url, start, end)
        return content

    def info(self, url: str) -> dict[str, Any]:
        """Return size and version of a file. See `cat_file` for what it raises."""
        _, headers = self._fetch(url, 0, 1)
        total = str(headers.get("Content-Range") or "").rpartition("/")[2]
        version = headers.get("ETag") or headers.get("Last-Modified") or ""
        return {"size": int(total) if total.isdigit() else None, "etag": version}

    def _fetch(self, url: str, start: int, end: int) -> tuple[bytes, Any]:
        wanted = {"Range": f"bytes={start}-{end - 1}"}
        try:
            with open_url(url, wanted, total_s=REQUEST_S, public_only=self.public_only) as response:
                if response.status != 206 or not _begins_at(response.headers, start):
                    raise NotImplementedError(NO_PARTS)
                content = bytearray()
                for chunk in response.chunks():
                    content += chunk
                    if len(content) > end - start:
                        raise NotImplementedError(NO_PARTS)
                if response.length not in (None, len(content)):
                    raise OSError(f"{len(content)} of {response.length} bytes arrived")
                return bytes(content), response.headers
        except FetchError as error:
            if error.status == 416:
                return b"", {}
            if error.status in (404, 410):
                raise FileNotFoundError(url) from error
            if error.status in (401, 403):
                raise PermissionError(url) from error
            raise OSError(error.reason) from error


def _begins_at(headers: Any, start: int) -> bool:
    """Return whether an answer is the part of a file that begins there, if it says so."""
    found = re.match(r"bytes ([0-9]+)-", str(headers.get("Content-Range") or ""))
    return found is None or int(found[1]) == start
