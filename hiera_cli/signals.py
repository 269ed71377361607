"""Signals: results are flushed, writes are finished or undone, and then the process ends."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from types import FrameType

from hiera_core.atomic import unfinished

from .exit_codes import (
    Interrupted,
    print_message,
    report_signal,
    reported_signals,
    signal_words,
)

# SIGHUP: the terminal was closed.
ENDING_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
GRACE_S = 3.0  # maximum seconds between a signal and the end of the process, if nothing is written
WRITE_GRACE_S = 60.0  # the same if a file is being written
POLL_S = 0.1
# Signals that come sooner after another are the same event: a terminal sends SIGINT to a whole
# group of processes, and torchrun then sends SIGTERM to its workers.
REPEAT_S = 0.5

_received: list[int] = []  # the signals, in order


def handle_signals() -> None:
    """End the process in good order after SIGINT, SIGTERM or SIGHUP.

    The first signal raises `Interrupted` in the main thread, after the write that it is in. If the
    process has not ended after `GRACE_S`, because Python raises exceptions between two bytecodes
    and a long forward pass can take minutes, a thread ends it. It first waits for a write that is
    in progress, and undoes it after `WRITE_GRACE_S`. A further signal undoes it at once.

    Signals that the process was started to ignore, as `nohup` and shells do, stay ignored.
    """
    if os.name != "posix":
        signal.signal(signal.SIGTERM, _on_signal)
        return
    receive, send = os.pipe()
    os.set_blocking(send, False)
    for signum in ENDING_SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _on_signal)
    signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(receive,), name="signals", daemon=True).start()


def end_as_signalled() -> None:
    """End the process by SIGHUP if it has received that, as shells and supervisors expect."""
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and _received[:1] == [hangup]:
        signal.signal(hangup, signal.SIG_DFL)
        os.kill(os.getpid(), hangup)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    """Interrupt the main thread once. `_watch` sees all signals, also further ones."""
    _received.append(signum)
    if len(_received) == 1:
        unfinished.raise_or_defer(Interrupted(signum))


def _watch(receive: int) -> None:
    """Wait for a signal, give the main thread some time to end the process, then end it."""
    signum = _next_signal(receive, None)
    assert signum is not None
    time.sleep(REPEAT_S)
    while _next_signal(receive, 0.0) is not None:  # repetitions of the same event
        pass
    begin = time.monotonic()
    is_impatient = _next_signal(receive, GRACE_S - REPEAT_S) is not None
    writes = unfinished.being_finished()
    if writes and not is_impatient:
        print_message(
            f"{signal_words(signum)}: finishing {writes[0]} first, for at most "
            f"{WRITE_GRACE_S:.0f} s; a second signal ends without it"
        )
        _wait_for_writes(receive, begin + WRITE_GRACE_S)
    undone = unfinished.undo_all()
    if signum not in reported_signals:  # the main thread may have done so, and then got stuck
        report_signal(signum, [f"{path} was not written" for path in undone])
    os._exit(128 + signum)


def _wait_for_writes(receive: int, deadline: float) -> None:
    """Wait until nothing is written any more, or for a further signal.

    The main thread may begin another write while it ends, such as features that it still holds.
    """
    idle_since = time.monotonic()
    while time.monotonic() < deadline:
        if unfinished.being_finished():
            idle_since = time.monotonic()
        if time.monotonic() > idle_since + 1 or _next_signal(receive, POLL_S) is not None:
            return


def _next_signal(receive: int, seconds: float | None) -> int | None:
    """Return the next ending signal, or None if there is none in time. Other signals arrive here
    too, such as SIGCHLD."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([receive], [], [], left)[0]:
            return None
        signum = os.read(receive, 1)[0]
        if signum in ENDING_SIGNALS:
            return signum
