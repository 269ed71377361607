"""Parts of files at http(s) servers, in the way of a file system of fsspec."""

from __future__ import annotations

import re
import urllib.parse
from typing import Any

from ...errors import InputError
from ...places import remote_requests
from ...weights.fetch import FetchError, PrivateNetworkError, is_public_host, open_url

REQUEST_S = 60.0  # maximum duration of a request
NO_PARTS = "the server sends no parts of files (HTTP ranges)"
WEB = ("http", "https")
# Places whose servers are not named by the URL, but by the settings of this machine.
PUBLIC = ("s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss", "memory")
PRIVATE_HINT = "--private-urls allows it"


def open_files(url: str, *, public_only: bool = False) -> tuple[Any, str]:
    """Return the file system of a URL, and the path within it. A web server is one whose files are
    read in ranges.

    Args:
        url: The URL.
        public_only: Refuse servers in private networks.

    Raises:
        UsageError: See `open_place`.
        InputError: See `check_public`. A web server is refused when it is asked for a file.
    """
    if _scheme(url) in WEB:
        return WebRanges(public_only), url
    if public_only:
        check_public(url)
    return remote_requests.open_place(url)


def check_public(url: str) -> None:
    """Check that a URL cannot lead into a private network: that its web server is on the internet,
    or that it names no server and, with `::`, no second URL.

    Raises:
        InputError: It may do so.
    """
    scheme = _scheme(url)
    if scheme in WEB:
        try:
            host = urllib.parse.urlsplit(url).hostname or ""
        except ValueError:  # who opens it says what is wrong
            return
        if not is_public_host(host):
            raise InputError(f"{host} is in a private network", PRIVATE_HINT)
    elif names_server(url):
        raise InputError(f"{scheme}:// may lead into a private network", PRIVATE_HINT)


def names_server(url: str) -> bool:
    """Return whether a URL names a server, or a second URL that may do so, rather than a place
    whose server is a setting of this machine."""
    return _scheme(url) not in PUBLIC or "::" in url


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


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
            InputError: The server is in a private network, and this is not allowed.
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
        except PrivateNetworkError as error:
            raise InputError(error.reason, PRIVATE_HINT) from error
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
