"""Measurements for Trackio: a database on this machine, or a Space of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import trackio

from .sender import Outcome
from .tracker import TrackedRun

PROJECT = "hiera"  # unless TRACKIO_PROJECT names another one


class TrackioTracker:
    """Writes measurements to Trackio's database, in the folder that TRACKIO_DIR names, or sends
    them to the Space of TRACKIO_SPACE_ID."""

    def __init__(self, run: TrackedRun) -> None:
        with _silent():  # it would print how to open its pages
            self._run: Any = trackio.init(
                os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=run.id,
                config=dict(run.facts),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._run.log(dict(values), step=step)

    def close(self, outcome: Outcome = "finished") -> None:
        """See `Tracker.close`."""
        with _silent():
            trackio.finish()


class _OtherThreads:
    """A stream that leaves out what this thread writes.

    A server can keep this thread waiting after the run has ended. What the main thread writes then,
    such as the result of the run, must not be lost.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread:
            return len(text)
        written: int = self._stream.write(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Leave out what this thread prints within the block."""
    with contextlib.redirect_stdout(_OtherThreads(sys.stdout)):
        yield
