"""A limit on how long huggingface_hub waits for a hub that does not answer, or only drips.

The client retries each request several times, with time limits of up to a minute each, so that a
hub that stalls is reported after minutes. Within `limited`, its session has hooks that measure the
progress of all requests together. Transfers by Xet do not use this session, and have limits of
their own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from .fetch import MIN_SPEED, PATIENCE_S

TOO_MANY_REQUESTS = 429


class HubStalled(Exception):
    """The hub does not answer within `PATIENCE_S`, sends too slowly, or asks us to come back."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Limit the requests that huggingface_hub sends from this thread within the `with` block.

    Raises:
        HubStalled: There is too little progress.
    """
    from huggingface_hub.utils import get_session

    hooks: Any = get_session().event_hooks
    patience = _Patience()
    hooks["request"].append(patience.on_request)
    hooks["response"].append(patience.on_response)
    try:
        yield
    finally:
        hooks["request"].remove(patience.on_request)
        hooks["response"].remove(patience.on_response)


def _limit_s() -> float:
    """Return how long to wait in seconds: longer if the user has told the client to wait longer."""
    from huggingface_hub import constants

    chosen = constants.HF_HUB_DOWNLOAD_TIMEOUT
    is_default = chosen == constants.DEFAULT_DOWNLOAD_TIMEOUT
    return PATIENCE_S if is_default else max(PATIENCE_S, chosen)


class _Patience:
    """Progress of the requests of one thread."""

    def __init__(self) -> None:
        self._limit = _limit_s()
        self._thread = threading.get_ident()
        self._last = time.monotonic()  # when something arrived last
        self._window, self._received = self._last, 0  # bytes that arrived since then

    def on_request(self, request: Any) -> None:
        """Let a request wait only for what is left of the patience."""
        if threading.get_ident() != self._thread:  # the session is shared
            return
        left = self._last + self._limit - time.monotonic()
        if left <= 0:
            raise HubStalled(f"no answer within {self._limit:.0f} s")
        timeouts = request.extensions.setdefault("timeout", {})
        for kind in ("connect", "read", "write", "pool"):
            timeouts[kind] = min(timeouts.get(kind) or left, left)

    def on_response(self, response: Any) -> None:
        """Watch the content of a response while the client reads it."""
        if threading.get_ident() != self._thread:
            return
        if response.status_code == TOO_MANY_REQUESTS and response.request.method == "GET":
            # The client would wait for as long as the answer says, which can be hours.
            raise HubStalled("it refuses more requests for now (429)")
        read_raw = response.iter_raw

        def iter_raw(chunk_size: int | None = None) -> Iterator[bytes]:
            self._last = self._window = time.monotonic()  # the answer itself is progress
            self._received = 0
            for chunk in read_raw():  # each chunk as it arrives, however small
                self._count(len(chunk))
                yield chunk

        response.iter_raw = iter_raw

    def _count(self, size: int) -> None:
        self._last = now = time.monotonic()
        self._received += size
        if now - self._window < self._limit:
            return
        if self._received < self._limit * MIN_SPEED:
            speed = f"less than {MIN_SPEED >> 10} KiB per second"
            raise HubStalled(f"{speed} for {self._limit:.0f} s")
        self._window, self._received = now, 0
