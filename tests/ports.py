"""Ports for servers that tests start in other processes."""

from __future__ import annotations

import os
import socket
from itertools import count

# Systems choose ports above 32767 for connections: one that was free may be taken a moment later.
FIRST, PER_WORKER = 20_000, 500
_numbers = count()


def free_port() -> int:
    """Return a port of 127.0.0.1 that no other test is given, and that is free."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 20
    while True:
        # Also by the process, since somebody may run the tests twice at a time.
        offset = (os.getpid() * 7 + next(_numbers)) % PER_WORKER
        port = FIRST + worker * PER_WORKER + offset
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
