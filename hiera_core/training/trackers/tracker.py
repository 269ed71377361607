"""The interface of a tracker, and the trackers by name."""

from __future__ import annotations

import importlib
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...atomic import atomic_file
from ...errors import UsageError, first_line
from ..recipe import TRACKERS

log = logging.getLogger("hiera")

IDS = "trackers.json"  # in the folder of the run: the name that each tracker has for it


class Tracker(Protocol):
    """Receives the measurements of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Receive measurements of a step, by names such as `step/loss` and `val/top1`."""

    def close(self) -> None:
        """Send what has not been sent."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker needs to know of a run.

    Args:
        folder: Folder of the run. Its name is that of the run.
        id: What identifies the run. A run that resumes keeps it.
        step: Number of steps that are done.
        facts: The recipe and other facts, by dotted key.
    """

    folder: Path
    id: str
    step: int
    facts: Mapping[str, Any]


# The module and the class of each tracker, the package that it needs, and the extra that has it.
MODULES: dict[str, tuple[str, str, str]] = {
    "tensorboard": ("tensorboard_tracker", "TensorBoardTracker", "torch.utils.tensorboard"),
    "wandb": ("wandb_tracker", "WandbTracker", "wandb"),
    "mlflow": ("mlflow_tracker", "MlflowTracker", "mlflow"),
    "trackio": ("trackio_tracker", "TrackioTracker", "trackio"),
}
assert tuple(MODULES) == TRACKERS


def check_installed(names: Sequence[str]) -> None:
    """Import the packages of trackers, before a run begins.

    Raises:
        UsageError: One of them is not installed. The hint is the command that installs it.
    """
    for name in names:
        try:
            importlib.import_module(MODULES[name][2])
        except ImportError as error:
            raise UsageError(
                f"--track {name} needs a package that is not installed",
                f"pip install 'hiera-toolkit[{name}]'",
            ) from error


class OpenTrackers:
    """The trackers of a run. One that fails is left out from then on, which a message says: the run
    goes on, and its log has all measurements.

    Args:
        trackers: The trackers, by name.
    """

    def __init__(self, trackers: dict[str, Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send measurements to all trackers; see `Tracker.log`."""
        for name, one in [*self._trackers.items()]:
            try:
                one.log(step, values)
            except Exception as error:  # their libraries and servers raise many types
                del self._trackers[name]
                self._say(name, error)

    def close(self) -> None:
        """Close all trackers; see `Tracker.close`."""
        for name, one in self._trackers.items():
            try:
                one.close()
            except Exception as error:
                self._say(name, error)
        self._trackers = {}

    @staticmethod
    def _say(name: str, error: Exception) -> None:
        reason = first_line(error)[:200] or type(error).__name__
        log.warning("%s gets no more measurements (%s); the log of the run has them", name, reason)


def open_trackers(
    names: Sequence[str], folder: Path, step: int, facts: Mapping[str, Any]
) -> OpenTrackers:
    """Open the trackers of a run.

    Args:
        names: Names of trackers.
        folder, step, facts: See `TrackedRun`.

    Raises:
        UsageError: A tracker cannot begin, for example because nobody is logged in.
        OutputError: A file in the folder cannot be written.
    """
    if not names:
        return OpenTrackers({})
    path = folder / IDS
    ids: dict[str, str] = {}
    if step and path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            ids = {str(key): str(value) for key, value in found.items()}
        except (ValueError, AttributeError):
            ids = {}  # damaged, so the trackers begin anew
    trackers: dict[str, Tracker] = {}
    for name in names:
        module, cls, _ = MODULES[name]
        ids.setdefault(name, f"{folder.resolve().name}-{secrets.token_hex(4)}")
        run = TrackedRun(folder, ids[name], step, facts)
        try:
            opened = getattr(importlib.import_module(f".{module}", __package__), cls)(run)
        except Exception as error:
            OpenTrackers(trackers).close()
            reason = first_line(error)[:200] or type(error).__name__
            raise UsageError(
                f"--track {name} cannot begin ({reason})", "check its settings, or leave it out"
            ) from error
        ids[name] = getattr(opened, "id", ids[name])  # some trackers choose it themselves
        trackers[name] = opened
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(ids))
    return OpenTrackers(trackers)
