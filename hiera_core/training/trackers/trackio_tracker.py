"""Measurements for Trackio: a database on this machine, or a Space of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from typing import Any

import trackio

from .sender import Outcome
from .tracker import TrackedRun

PROJECT = "hiera"  # unless TRACKIO_PROJECT names another one


class TrackioTracker:
    """Writes measurements to Trackio's database, in the folder that TRACKIO_DIR names, or sends
    them to the Space of TRACKIO_SPACE_ID."""

    def __init__(self, run: TrackedRun) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it would print how to open its pages
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
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()
