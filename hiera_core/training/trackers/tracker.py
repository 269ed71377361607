"""The trackers by name, and how they are opened."""

from __future__ import annotations

import functools
import importlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...atomic import atomic_file
from ...errors import UsageError, first_line
from ..recipe import TRACKERS
from .sender import Sender, Tracker

IDS = "trackers.json"  # in the folder of the run: the name that each tracker has for it


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


def open_trackers(
    names: Sequence[str], folder: Path, step: int, facts: Mapping[str, Any]
) -> list[Tracker]:
    """Open the trackers of a run.

    Args:
        names: Names of trackers.
        folder, step, facts: See `TrackedRun`.

    Raises:
        UsageError: A tracker cannot begin, e.g. because its server cannot be reached.
        OSError: A file in the folder cannot be written.
    """
    if not names:
        return []
    path = folder / IDS
    ids: dict[str, str] = {}
    if step and path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            ids = {str(key): str(value) for key, value in found.items()}
        except (ValueError, AttributeError):
            ids = {}  # damaged, so the trackers begin anew
    trackers: list[Tracker] = []
    for name in names:
        module, cls, _ = MODULES[name]
        ids.setdefault(name, f"{folder.resolve().name}-{secrets.token_hex(4)}")
        run = TrackedRun(folder, ids[name], step, facts)
        try:
            create = functools.partial(
                getattr(importlib.import_module(f".{module}", __package__), cls), run
            )
            # TensorBoard only writes files here, whose errors are those of the run.
            opened: Tracker = create() if name == "tensorboard" else Sender(create, name)
        except Exception as error:
            for earlier in trackers:
                earlier.close("failed")
            raise UsageError(
                f"--track {name} cannot begin ({first_line(error)})",
                "check its settings and the network, or leave it out",
            ) from error
        ids[name] = getattr(opened, "id", None) or ids[name]  # some trackers choose it themselves
        trackers.append(opened)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(ids))
    return trackers
