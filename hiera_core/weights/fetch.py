"""Open http(s) URLs, with limits on speed, on time and on redirects.

A server can keep a connection open for ever by sending a byte now and then, in the header too. So a
thread watches each transfer, and closes its socket when too little arrives.

A redirect must lead to an http(s) URL. A public server cannot redirect to an address in the user's
own network, whose services often trust whoever can reach them; a redirect to the same name, which
then has another address, is no exception. The user may name a local server.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import IO, Any

from ..errors import first_line

SCHEMES = ("http", "https")
PATIENCE_S = 20.0  # a transfer ends if it is slower than MIN_SPEED for so many seconds
MIN_SPEED = 1024  # bytes per second
CHUNK = 1 << 20  # bytes
URL_CHARACTERS = "%/:=&?~+!$,;'@()*[]"  # they keep their meaning
HEADERS = {"User-Agent": "hiera-toolkit", "Accept-Encoding": "identity"}


class FetchError(Exception):
    """A URL that cannot be fetched.

    Args:
        reason: Why, for the user.
        status: Status code of the server's answer, if that is the reason.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.status = reason, status


class PrivateNetworkError(FetchError):
    """A host in a private network, where only hosts on the internet are allowed."""


class Response:
    """The answer of a server, whose content is read in chunks.

    Attributes:
        status: Status code: 200, or 206 for a part of the file.
        headers: Headers of the answer.
    """

    def __init__(self, answer: http.client.HTTPResponse, watch: _Watch) -> None:
        self.status, self.headers = answer.status, answer.headers
        self._answer, self._watch = answer, watch

    @property
    def length(self) -> int | None:
        """Number of bytes that follow, if the server says so."""
        text = self.headers.get("Content-Length") or ""
        return int(text) if text.isascii() and text.isdigit() else None

    def chunks(self) -> Iterator[bytes]:
        """Yield the content as it arrives.

        Raises:
            FetchError: The connection is lost, or too slow. If the server does not say how many
                bytes follow, a lost connection can look like the end of the content.
        """
        while True:
            with self._watch.as_fetch_errors():
                # `read` would wait for the whole chunk, however slowly it arrives.
                chunk = self._answer.read1(CHUNK)
            if not chunk:
                return
            self._watch.received += len(chunk)
            yield chunk


@contextlib.contextmanager
def open_url(
    url: str,
    headers: dict[str, str] | None = None,
    total_s: float | None = None,
    *,
    public_only: bool = False,
) -> Iterator[Response]:
    """Open a URL, and yield the response within the `with` block.

    Args:
        url: The http(s) URL.
        headers: Further headers of the request. The content is always requested uncompressed.
        total_s: Maximum duration of the whole transfer in seconds.
        public_only: Refuse hosts in private networks.

    Raises:
        FetchError: The URL is not valid or not allowed, the server does not answer or reports an
            error, or it sends compressed content or a redirect that is not allowed.
        PrivateNetworkError: With `public_only`, the host is in a private network.
    """
    with _Watch(total_s) as watch:
        with watch.as_fetch_errors():
            check_url(url)
            if public_only:
                host = str(urllib.parse.urlsplit(url).hostname)
                if not is_public_host(host):
                    raise PrivateNetworkError(f"{host} is in a private network")
                watch.public_only = True
            opener = urllib.request.build_opener(
                _HTTPHandler(watch), _HTTPSHandler(watch), _RedirectHandler(url, watch)
            )
            request = urllib.request.Request(_quoted(url), headers={**HEADERS, **(headers or {})})
            answer = opener.open(request, timeout=PATIENCE_S)
        with answer:
            watch.received += int(PATIENCE_S * MIN_SPEED) + 1  # the header is progress too
            encoding = answer.headers.get("Content-Encoding", "identity")
            if encoding.strip().lower() not in ("identity", ""):
                raise FetchError(f"the server compresses it ({encoding})")
            yield Response(answer, watch)


def check_url(url: str) -> None:
    """Check that this is an http(s) URL with a host.

    Raises:
        FetchError: It is not.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        has_host = bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError as error:
        raise FetchError(f"the URL is not valid: {first_line(error)}") from error
    if parts.scheme not in SCHEMES or not has_host:
        raise FetchError("the URL is not valid: it needs http:// or https://, and a host")


def _quoted(url: str) -> str:
    """Return a URL with spaces and non-ASCII characters in its path and query encoded."""
    parts = urllib.parse.urlsplit(url)
    path, query = (
        urllib.parse.quote(text, safe=URL_CHARACTERS, errors="surrogateescape")
        for text in (parts.path, parts.query)
    )
    return parts._replace(path=path, query=query).geturl()


def is_public_host(host: str) -> bool:
    """Return whether all addresses of a host are on the internet, not in a private network.

    A host that cannot be resolved here counts as public: a proxy may know it.
    """
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return True
    return all(is_public_address(str(entry[4][0])) for entry in found)


def is_public_address(text: str) -> bool:
    """Return whether an IP address is neither private, nor of this machine, nor link-local."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global


class _Watch:
    """Ends a transfer that is too slow, or takes too long, by closing its socket.

    Attributes:
        received: Number of bytes that have arrived; the reader counts them.
        public_only: Whether connections to private addresses are refused from now on.
    """

    def __init__(self, total_s: float | None) -> None:
        self.received, self.public_only = 0, False
        self._total_s = total_s
        self._reason = ""
        self._socket: socket.socket | None = None
        self._done = threading.Event()

    def __enter__(self) -> _Watch:
        threading.Thread(target=self._run, name="transfer watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    @contextlib.contextmanager
    def as_fetch_errors(self) -> Iterator[None]:
        """Convert network errors to a FetchError.

        Do not write files within the block, because disk errors are OSErrors, too.
        """
        try:
            yield
        except FetchError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
            status = None
            if isinstance(error, urllib.error.HTTPError):
                status = error.code
                error.close()
            raise FetchError(self._reason or _reason_of(error), status) from error
        if self._reason:  # the reader sees a socket that was closed as the end of the content
            raise FetchError(self._reason)

    def attach(self, connected: socket.socket) -> None:
        """Watch a socket that has just been connected, instead of the one before.

        Raises:
            FetchError: The transfer has ended, or the address is not allowed.
        """
        self._socket = connected
        if self._reason:
            raise FetchError(self._reason)
        if urllib.request.getproxies():  # the address of a proxy says nothing about the host
            return
        # The name of a host can resolve to another address now than when the redirect was checked.
        peer = str(connected.getpeername()[0])
        is_public = is_public_address(peer)
        if self.public_only and not is_public:
            raise FetchError(f"it leads to the private address {peer}")
        self.public_only = self.public_only or is_public

    def _run(self) -> None:
        start, before = time.monotonic(), 0
        while True:
            left = PATIENCE_S
            if self._total_s is not None:
                left = min(left, start + self._total_s - time.monotonic())
            if self._done.wait(max(left, 0)):
                return
            if self._total_s is not None and time.monotonic() - start >= self._total_s:
                self._end(f"it is not complete after {self._total_s:.0f} s")
                return
            if self.received - before < PATIENCE_S * MIN_SPEED:
                self._end(f"less than {MIN_SPEED >> 10} KiB per second for {PATIENCE_S:.0f} s")
                return
            before = self.received

    def _end(self, reason: str) -> None:
        self._reason = reason
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # The method of an SSL socket would also discard the state that the reader uses.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _HTTPConnection(http.client.HTTPConnection):
    def __init__(self, host: str, *, watch: _Watch, **options: Any) -> None:
        super().__init__(host, **options)
        self._watch = watch

    def connect(self) -> None:
        super().connect()
        self._watch.attach(self.sock)


class _HTTPSConnection(http.client.HTTPSConnection):
    def __init__(self, host: str, *, watch: _Watch, **options: Any) -> None:
        super().__init__(host, **options)
        self._watch = watch

    def connect(self) -> None:
        super().connect()
        self._watch.attach(self.sock)


class _HTTPHandler(urllib.request.HTTPHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_HTTPConnection, request, watch=self._watch)  # type: ignore[arg-type]


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_HTTPSConnection, request, watch=self._watch)  # type: ignore[arg-type]


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) URLs, but not from the internet into a private network."""

    def __init__(self, url: str, watch: _Watch) -> None:
        self._first_host = urllib.parse.urlsplit(url).hostname or ""
        self._watch = watch

    def redirect_request(
        self,
        request: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        message: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        check_url(newurl)
        host = urllib.parse.urlsplit(newurl).hostname or ""
        if host != self._first_host and is_public_host(self._first_host):
            self._watch.public_only = True
            if not is_public_host(host):
                raise FetchError(f"it redirects to the private address {host}")
        return super().redirect_request(request, fp, code, message, headers, newurl)


def _reason_of(error: BaseException) -> str:
    """Return the reason of a network error in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return first_line(error)
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"no data for {PATIENCE_S:.0f} s"
    if isinstance(error, http.client.HTTPException):
        return f"invalid response: {first_line(error)}"
    return getattr(error, "strerror", None) or first_line(error)
