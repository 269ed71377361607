"""Keep what C libraries print to themselves off the terminal.

libtiff and others print warnings about damaged files straight to file descriptor 2. They would
stand between our messages, without the name of the file, and they say no more than ours.
"""

from __future__ import annotations

import faulthandler
import os
import sys


def silence() -> None:
    """Point file descriptor 2 to the null device, and `sys.stderr` to where it pointed before.

    Call this once, before threads start. Python's own messages, tracebacks and crash reports still
    reach the terminal. Child processes that inherit the descriptor are silent too, unless they are
    given `sys.stderr` as theirs.
    """
    try:
        sys.stderr.flush()
        terminal = os.dup(2)
    except (OSError, ValueError, AttributeError):  # stderr is closed, or no file
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    sys.stderr = os.fdopen(
        terminal, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors
    )
    if faulthandler.is_enabled():
        faulthandler.enable(sys.stderr)
